"""SupSup, SSNeT, ExSSNeT and WSN: supermask methods that differ only in what they train when."""

from dataclasses import dataclass, field

from ..strategy import Strategy


@dataclass(frozen=True)
class Method(Strategy):
    """A strategy that is told by what it trains after, or together with, the scores.

    Args:
        name: Name of the method.
        weight_phase: Train weights of the fixed mask after the mask phase.
        exclusive: Train only weights that no earlier task uses, so that nothing is forgotten.
        joint: Train scores and unused weights together, in one phase.
        mask_phase: Train scores; otherwise the mask is the top k of the scores that a task starts with.
        source: The paper.
    """

    name: str = field()
    weight_phase: bool = False
    exclusive: bool = True
    joint: bool = False
    mask_phase: bool = True
    source: str = ""

    @property
    def trains(self) -> tuple[str, ...]:  # type: ignore[override]
        """See `Strategy`."""
        if self.joint:
            return ("joint",)
        return ("mask",) * self.mask_phase + ("weight",) * self.weight_phase


SUPSUP = Method("supsup", source="Wortsman et al., NeurIPS 2020")
SSNET = Method("ssnet", weight_phase=True, exclusive=False, source="Yadav & Bansal, arXiv 2210.10209")
EXSSNET = Method("exssnet", weight_phase=True, source="Yadav & Bansal, arXiv 2210.10209")
WSN = Method("wsn", joint=True, source="Kang et al., ICML 2022")
