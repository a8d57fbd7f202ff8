"""Does a chat template copy what messages say, and nothing else? Told from its syntax tree, before any row.

If it does, one rendering with stand-ins for the contents tells how every conversation of that shape looks (see
shapes.py), and a row costs a join of strings instead of a run of the template. The answer is on the safe side:
a content may be printed, joined to other text by + or ~, stripped, and asked whether it is empty, directly or
through variables; a template that does anything else with one is not understood, and every row is rendered.
"""

from collections.abc import Sequence
from enum import Enum

from jinja2 import nodes


class Kind(Enum):
    """What an expression holds: nothing of a content, text with some, a message, a list of messages."""

    PLAIN = 0
    TEXT = 1
    MESSAGE = 2
    MESSAGES = 3


class NotUnderstoodError(Exception):
    """The template does something with a content that this file does not follow."""


STRIPS = ("trim", "strip", "lstrip", "rstrip")
TYPE_TESTS = ("defined", "undefined", "string", "none", "mapping", "sequence", "iterable", "number", "boolean")
FUNCTIONS = ("raise_exception", "namespace", "strftime_now", "range", "dict")
PLAIN_STATEMENTS = (nodes.Break, nodes.Continue)


def copies_contents(tree: nodes.Template) -> bool:
    """Whether the template of this syntax tree treats the contents of messages as text to be copied."""
    flow = _Flow()
    try:
        while True:  # until no variable turns out to hold more than was known
            known = dict(flow.variables)
            flow.statements(tree.body)
            if flow.variables == known:
                return True
    except NotUnderstoodError:
        return False


class _Flow:
    """One pass over a template.

    `variables` holds what each name may hold, and under ("namespace", name) each attribute of any namespace.
    """

    def __init__(self) -> None:
        self.variables: dict[object, Kind] = {"messages": Kind.MESSAGES}

    def statements(self, body: Sequence[nodes.Node]) -> None:
        for statement in body:
            self.statement(statement)

    def statement(self, node: nodes.Node) -> None:
        match node:
            case nodes.Output():
                for part in node.nodes:
                    self.text(part)
            case nodes.If():
                self.kind(node.test)
                self.statements([*node.body, *node.elif_, *node.else_])
            case nodes.For(recursive=False):
                self.loop(node)
            case nodes.Assign():
                self.assign(node.target, self.kind(node.node))
            case nodes.AssignBlock(filter=None):
                self.statements(node.body)
                self.assign(node.target, Kind.TEXT)
            case nodes.CallBlock(call=nodes.Call(node=nodes.ExtensionAttribute())):  # {% generation %}
                self.statements(node.body)
            case nodes.Scope():
                self.statements(node.body)
            case nodes.ExprStmt():
                self.kind(node.node)
            case _ if not isinstance(node, PLAIN_STATEMENTS):
                raise NotUnderstoodError(type(node).__name__)

    def loop(self, node: nodes.For) -> None:
        over = self.kind(node.iter)
        if over in (Kind.TEXT, Kind.MESSAGE):
            raise NotUnderstoodError("a loop over a text or a message")
        self.assign(node.target, Kind.MESSAGE if over is Kind.MESSAGES else Kind.PLAIN)
        if over is Kind.MESSAGES:
            self.join("loop", Kind.MESSAGE)
        if node.test is not None:
            self.kind(node.test)
        self.statements([*node.body, *node.else_])

    def assign(self, target: nodes.Node, kind: Kind) -> None:
        match target:
            case nodes.Name():
                self.join(target.name, kind)
            case nodes.NSRef():
                self.join(("namespace", target.attr), kind)
            case nodes.Tuple() if kind is Kind.PLAIN:
                for item in target.items:
                    self.assign(item, kind)
            case _:
                raise NotUnderstoodError("an assignment")

    def join(self, name: object, kind: Kind) -> None:
        before = self.variables.get(name, kind)
        if before is not kind and Kind.MESSAGE.value <= max(before.value, kind.value):
            raise NotUnderstoodError(f"{name} holds messages and something else")
        self.variables[name] = max(before, kind, key=lambda one: one.value)

    def plain(self, *values: nodes.Node | None) -> Kind:
        """Require that nothing of a content is in any of `values`."""
        if any(self.kind(value) is not Kind.PLAIN for value in values if value is not None):
            raise NotUnderstoodError("a content is more than copied")
        return Kind.PLAIN

    def text(self, node: nodes.Node) -> Kind:
        """Require a text, of contents or not."""
        kind = self.kind(node)
        if kind not in (Kind.PLAIN, Kind.TEXT):
            raise NotUnderstoodError("a message where a text should be")
        return kind

    def kind(self, node: nodes.Node) -> Kind:  # one line for each thing that an expression can be
        match node:
            case nodes.Const() | nodes.TemplateData():
                return Kind.PLAIN
            case nodes.Name():
                return Kind.PLAIN if node.name == "loop" else self.variables.get(node.name, Kind.PLAIN)
            case nodes.NSRef():
                return self.variables.get(("namespace", node.attr), Kind.PLAIN)
            case nodes.Add() | nodes.Or() | nodes.And():
                return self.wider(self.text(node.left), self.text(node.right))
            case nodes.Concat():
                return self.wider(*map(self.text, node.nodes))
            case nodes.CondExpr():
                self.kind(node.test)
                return self.wider(*(self.kind(one) for one in (node.expr1, node.expr2) if one is not None))
            case nodes.Not():
                self.kind(node.node)
                return Kind.PLAIN
            case nodes.Test():
                return self.test(node)
            case nodes.Compare():
                return self.comparison(node)
            case nodes.Getattr() | nodes.Getitem():
                return self.part(node)
            case nodes.Filter():
                return self.filtered(node)
            case nodes.Call():
                return self.call(node)
            case nodes.List() | nodes.Tuple():
                return self.plain(*node.items)
            case nodes.Dict():
                return self.plain(*(part for pair in node.items for part in (pair.key, pair.value)))
            case nodes.Neg() | nodes.Pos():
                return self.plain(node.node)
            case nodes.BinExpr():
                return self.plain(node.left, node.right)
        raise NotUnderstoodError(type(node).__name__)

    def wider(self, *kinds: Kind) -> Kind:
        if len(set(kinds)) > 1 and not set(kinds) <= {Kind.PLAIN, Kind.TEXT}:
            raise NotUnderstoodError("messages or something else")
        return max(kinds, key=lambda one: one.value)

    def test(self, node: nodes.Test) -> Kind:
        self.plain(*node.args)
        if node.name not in TYPE_TESTS or node.kwargs:
            self.plain(node.node)
        else:
            self.kind(node.node)
        return Kind.PLAIN

    def comparison(self, node: nodes.Compare) -> Kind:
        def is_empty(value: nodes.Node) -> bool:
            return isinstance(value, nodes.Const) and value.value in ("", None)

        others = [operand.expr for operand in node.ops]
        if all(operand.op in ("eq", "ne") for operand in node.ops) and all(map(is_empty, others)):
            self.text(node.expr)  # is it empty?
            return Kind.PLAIN
        return self.plain(node.expr, *others)

    def part(self, node: nodes.Getattr | nodes.Getitem) -> Kind:
        """An attribute, an element or a slice."""
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            self.plain(node.arg.start, node.arg.stop, node.arg.step)
            return self.kind(node.node) if self.kind(node.node) is Kind.MESSAGES else self.plain(node.node)
        if isinstance(node, nodes.Getattr):
            name: object = node.attr
        else:
            name = node.arg.value if isinstance(node.arg, nodes.Const) else None
            self.plain(node.arg)
        if isinstance(node.node, nodes.Name) and node.node.name == "loop" and name in ("previtem", "nextitem"):
            return self.variables.get("loop", Kind.PLAIN)
        whole = self.kind(node.node)
        if whole is Kind.PLAIN and ("namespace", name) in self.variables:
            return self.variables[("namespace", name)]
        if whole is Kind.MESSAGES and isinstance(node, nodes.Getitem) and not isinstance(name, str):
            return Kind.MESSAGE
        if whole is Kind.MESSAGE and isinstance(name, str) and not hasattr(dict, name):
            return Kind.TEXT if name == "content" else Kind.PLAIN
        return self.plain(node.node)

    def filtered(self, node: nodes.Filter) -> Kind:
        if node.node is None:
            raise NotUnderstoodError("a filter of a block")
        whole, has_arguments = self.kind(node.node), bool(node.args or node.kwargs)
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise NotUnderstoodError("a filter's arguments")
        if whole is Kind.MESSAGES and not has_arguments and node.name in ("length", "count"):
            return Kind.PLAIN
        if whole is Kind.MESSAGES and not has_arguments and node.name in ("first", "last"):
            return Kind.MESSAGE
        if whole is Kind.TEXT and not has_arguments and node.name in STRIPS:
            return Kind.TEXT
        return self.plain(node.node, *node.args, *(pair.value for pair in node.kwargs))

    def call(self, node: nodes.Call) -> Kind:
        arguments = [*node.args, *(pair.value for pair in node.kwargs)]
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise NotUnderstoodError("a call's arguments")
        called = node.node
        if isinstance(called, nodes.Getattr):
            whole = self.kind(called.node)
            if whole is Kind.TEXT and called.attr in STRIPS and not arguments:
                return Kind.TEXT
            return self.plain(called.node, *arguments)
        if not isinstance(called, nodes.Name) or called.name not in FUNCTIONS:
            raise NotUnderstoodError("a call")
        if called.name == "raise_exception":
            for argument in arguments:
                self.text(argument)
            return Kind.PLAIN
        return self.plain(*arguments)
