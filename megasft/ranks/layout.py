"""One way to split a model and its batch over ranks: its sizes, Megatron's flags and its name."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to run the same global batch.

    Attributes:
        ranks: Processes; what TP, CP and PP leave is data-parallel.
        tp: Tensor-parallel ranks; ``sp`` cuts activations over them, too.
        vp: Chunks of the model per pipeline rank (interleaved schedule) when above 1.
        ep: Expert-parallel ranks, taken from the data- and context-parallel ones, or from the
            tensor-parallel ones where ``etp`` is 1.
        etp: Tensor-parallel ranks of an expert; 0: as many as ``tp``.
        mbs: Rows of a micro-batch.
        more: Further flags; ``note`` is how a table calls them.
    """

    ranks: int = 1
    tp: int = 1
    sp: bool = False
    cp: int = 1
    pp: int = 1
    vp: int = 1
    ep: int = 1
    etp: int = 0
    mbs: int = 1
    note: str = ""
    more: tuple[str, ...] = ()

    @property
    def dp(self) -> int:
        """Data-parallel ranks."""
        return self.ranks // (self.tp * self.cp * self.pp)

    @property
    def name(self) -> str:
        """The layout in the words of a table, as in ``TP 2 + SP x CP 2``."""
        tp = f"TP {self.tp}" + (" + SP" if self.sp else "")
        pp = f"PP {self.pp}" + (f" x VP {self.vp}" if self.vp > 1 else "")
        sizes = (
            *((tp, self.tp), (f"CP {self.cp}", self.cp), (pp, self.pp)),
            *((f"DP {self.dp}", self.dp), (f"EP {self.ep}", self.ep)),
        )
        parts = [text for text, size in sizes if size > 1] or ["1 rank"]
        options = ([f"mbs {self.mbs}"] if self.mbs > 1 else []) + ([self.note] if self.note else [])
        return " x ".join(parts) + "".join(f", {option}" for option in options)

    def flags(self, *, num_layers: int) -> list[str]:
        """Return Megatron's flags for a model of so many layers."""
        sizes = {
            "--tensor-model-parallel-size": self.tp,
            "--context-parallel-size": self.cp,
            "--pipeline-model-parallel-size": self.pp,
            "--micro-batch-size": self.mbs,
        }
        if self.vp > 1:
            sizes["--num-layers-per-virtual-pipeline-stage"] = num_layers // (self.pp * self.vp)
        if self.ep > 1:
            sizes["--expert-model-parallel-size"] = self.ep
        if self.etp:
            sizes["--expert-tensor-parallel-size"] = self.etp
        flags = [text for flag, size in sizes.items() for text in (flag, str(size))]
        return [*flags, *(["--sequence-parallel"] if self.sp else []), *self.more]
