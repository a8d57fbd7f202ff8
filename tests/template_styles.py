# ruff: noqa: SIM905  the tokens read better as words
"""Chat templates in the styles of published models, in our own words; MARK and END stand for generation markers."""

MARK, END = "{%- generation -%}", "{%- endgeneration -%}"

SPECIALS = {
    "chatml": "<|im_start|> <|im_end|>".split(),
    "llama-3": "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|python_tag|>".split(),
    "mistral": (
        "<s> [INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] </s>"
    ).split(),
    "deepseek": (
        "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜> <｜tool▁calls▁begin｜> "
        "<｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁sep｜> "
        "<｜tool▁output▁begin｜> <｜tool▁output▁end｜>"
    ).split(),
    "gemma": "<bos> <start_of_turn> <end_of_turn>".split(),
    "glm": "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>".split(),
    "thinking": "<|im_start|> <|im_end|>".split(),
}
ENDS = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>", "mistral": "</s>", "deepseek": "<｜end▁of▁sentence｜>"}
ENDS |= {"gemma": "<end_of_turn>", "glm": "<|user|>", "thinking": "<|im_end|>"}
WITH_TOOLS = ("chatml", "llama-3", "mistral", "deepseek", "glm", "thinking")
WITH_SYSTEM = tuple(name for name in SPECIALS if name != "gemma")

STYLES = {}
STYLES["chatml"] = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- 'Functions:' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        MARK
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        END
        {{- '\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
STYLES["llama-3"] = """
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- if messages[0].role == 'system' %}
    {%- set ns.system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n\\n' + ns.system }}
{%- for tool in tools or [] %}{{- '\\n' }}{{- tool | tojson(indent=4) }}{%- endfor %}
{{- '<|eot_id|>' }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        MARK
        {{- message.content | trim }}
        {%- for call in message.tool_calls or [] %}
            {{- '<|python_tag|>' }}{{- call.function | tojson }}
        {%- endfor %}
        {{- '<|eot_id|>' }}
        END
    {%- elif message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}{{- message.content | tojson }}{{- '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
STYLES["mistral"] = """
{%- set ns = namespace(system='') %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set ns.system = message.content + '\\n\\n' %}
    {%- elif message.role == 'user' %}
        {%- if tools and (loop.index0 == 0 or messages[loop.index0 - 1].role == 'system') %}
            {{- '[AVAILABLE_TOOLS]' }}{{- tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + ns.system + message.content + '[/INST]' }}
        {%- set ns.system = '' %}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS]{"content": ' }}{{- message.content | tojson }}{{- '}[/TOOL_RESULTS]' }}
    {%- elif message.role == 'assistant' %}
        MARK
        {%- if message.content %}{{- ' ' + message.content }}{%- endif %}
        {%- if message.tool_calls %}
            {{- '[TOOL_CALLS][' }}
            {%- for call in message.tool_calls %}
                {{- call.function | tojson }}{%- if not loop.last %}{{- ', ' }}{%- endif %}
            {%- endfor %}
            {{- ']' }}
        {%- endif %}
        {{- eos_token }}
        END
    {%- else %}
        {{- raise_exception('only user, assistant, system and tool are supported') }}
    {%- endif %}
{%- endfor %}
"""
STYLES["deepseek"] = """
{%- set ns = namespace(system='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{%- set ns.system = ns.system + message.content %}{%- endif %}
{%- endfor %}
{{- bos_token }}{{- ns.system }}
{%- for tool in tools or [] %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<｜User｜>' + message.content + '<｜Assistant｜>' }}
    {%- elif message.role == 'assistant' %}
        MARK
        {{- message.content }}
        {%- if message.tool_calls %}
            {{- '<｜tool▁calls▁begin｜>' }}
            {%- for call in message.tool_calls %}
                {{- '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name + '\\n```json\\n' }}
                {{- call.function.arguments | tojson }}{{- '\\n```<｜tool▁call▁end｜>' }}
            {%- endfor %}
            {{- '<｜tool▁calls▁end｜>' }}
        {%- endif %}
        {{- '<｜end▁of▁sentence｜>' }}
        END
    {%- elif message.role == 'tool' %}
        {{- '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' }}
    {%- endif %}
{%- endfor %}
"""
STYLES["gemma"] = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message.role == 'assistant' %}
        {{- '<start_of_turn>model\\n' }}
        MARK
        {{- message.content | trim + '<end_of_turn>' }}
        END
        {{- '\\n' }}
    {%- else %}
        {{- '<start_of_turn>' + message.role + '\\n' + message.content | trim + '<end_of_turn>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
"""
# Its turns have no end token of their own: the next role's token ends them.
STYLES["glm"] = """
[gMASK]<sop>
{%- for tool in tools or [] %}{{- '<|system|>\\n' }}{{- tool | tojson }}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|assistant|>' }}
        MARK
        {{- '\\n' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>' + call.function.name + '\\n' }}
            {%- for key, value in call.function.arguments.items() %}
                {{- '<arg_key>' + key + '</arg_key>\\n<arg_value>' }}{{- value | tojson }}{{- '</arg_value>\\n' }}
            {%- endfor %}
            {{- '</tool_call>' }}
        {%- endfor %}
        {{- '<|observation|>' if message.tool_calls else '<|user|>' }}
        END
    {%- elif message.role == 'tool' %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
    {%- elif message.role == 'user' %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role == 'system' %}{{- '<|user|>' }}{%- endif %}
        {{- '\\n' + message.content }}
    {%- else %}
        {{- '<|' + message.role + '|>\\n' + message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""
# ChatML for models that think: thoughts stay behind the last question and are cut before it.
STYLES["thinking"] = """
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for tool in tools or [] %}{{- '<|im_start|>system\\n' }}{{- tool | tojson }}{{- '<|im_end|>\\n' }}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set thought = message.reasoning_content or '' %}
        {%- set said = message.content %}
        {%- if not thought and '</think>' in said %}
            {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        MARK
        {%- if loop.index0 > ns.last %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}
        {{- said }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' }}{{- call.function | tojson }}{{- '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        END
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def marked(name):
    """Return the template of a style with generation markers."""
    return STYLES[name].strip().replace("MARK", MARK).replace("END", END)


def bare(name):
    """Return the template of a style as it is published: without markers."""
    return STYLES[name].strip().replace("        MARK\n", "").replace("        END\n", "")
