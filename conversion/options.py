"""What a conversion can be told, the same for both directions."""

from dataclasses import dataclass

from toolkits.foundation.errors import UsageError
from toolkits.foundation.process import usable_cores

from .layout import dtype_named

MOST_WORKERS = 256


@dataclass(frozen=True)
class Options:
    """Choices of a conversion; raises UsageError when they cannot be."""

    dtype: str | None = None  # cast to float32, float16 or bfloat16
    dequantize: bool = False  # let FP8 weights become bfloat16; only from HuggingFace
    verify: bool = True  # hash what is read and written, read the result again and compare it bit for bit
    allow_nonfinite: bool = False  # convert NaN and Inf too
    overwrite: bool = False  # replace an output that is there, when the new one is complete
    workers: int | None = None  # threads that read, check and write; None: one for each core, 8 at most
    resume: bool = False  # go on with an output that a process left unfinished
    restart: bool = False  # throw it away

    def __post_init__(self) -> None:
        dtype_named(self.dtype)
        if self.workers is not None and not 1 <= self.workers <= MOST_WORKERS:
            raise UsageError(f"--workers {self.workers}: choose 1 to {MOST_WORKERS}")

    @property
    def num_workers(self) -> int:
        """The number of threads."""
        return self.workers or min(usable_cores(), 8)

    def facts(self) -> dict[str, object]:
        """Return what of them decides the bytes of the output, or whether they were compared."""
        return {
            "--dtype": self.dtype and str(dtype_named(self.dtype)),
            "--dequantize": self.dequantize,
            "--no-verify": not self.verify,
            "--allow-nonfinite": self.allow_nonfinite,
        }
