"""The methods that differ only in what they train when: presets of the learner."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """What a method trains after, or together with, the scores.

    mask_phase: train scores; without it the mask is the top k of the scores that a task starts with.
    weight_phase: train weights of the fixed mask after the mask phase.
    exclusive: train only weights that no earlier task uses, so that nothing is forgotten.
    joint: one phase in which scores and unused weights are trained together.
    """

    name: str
    weight_phase: bool = False
    exclusive: bool = True
    joint: bool = False
    mask_phase: bool = True
    source: str = ""

    def budget(self, mask_epochs: int, weight_epochs: int) -> tuple[int, int]:
        """Epochs of the two phases, with the same total for every method."""
        if self.mask_phase and self.weight_phase:
            return mask_epochs, weight_epochs
        total = mask_epochs + weight_epochs
        return (total, 0) if self.mask_phase else (0, total)


METHODS = {
    m.name: m
    for m in (
        Method("supsup", source="Wortsman et al., NeurIPS 2020"),
        Method("ssnet", weight_phase=True, exclusive=False, source="Yadav & Bansal, arXiv 2210.10209"),
        Method("exssnet", weight_phase=True, source="Yadav & Bansal, arXiv 2210.10209"),
        Method("wsn", joint=True, source="Kang et al., ICML 2022"),
    )
}


def preset(name: str) -> Method:
    """The preset of that name; ValueError with the known names otherwise."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]
