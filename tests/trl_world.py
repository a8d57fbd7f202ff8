"""TRL's trainers, on the tokens that ours trains on, in their order, with its optimizer."""

import pytest
import torch


def steps_of_trl(kind, rows, config, *, model, folder, steps, **settings):
    """Train with TRL's trainer of a `kind` (DPO, KTO) on `rows` of tokens; return what it logs of each step."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class Trainer(getattr(trl, f"{kind}Trainer")):
        """Takes tokens as they are, in the order in which they are."""

        def _prepare_dataset(self, dataset, *_):
            return dataset

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    optimizer = config.optimizer
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(folder),
        per_device_train_batch_size=len(rows) // steps,
        max_steps=steps,
        learning_rate=optimizer.lr,
        lr_scheduler_type="constant",
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_epsilon=optimizer.adam_eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.clip_grad,
        beta=config.reference.beta,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **settings,
    )
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager"),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    logged = [step for step in trainer.state.log_history if "loss" in step]
    assert len(logged) == steps
    return logged
