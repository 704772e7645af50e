import re
from pathlib import Path

import pytest

from megasft.mixture import read_mixture

TEXT = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
MIXTURES = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("number", range(3))
def test_the_schedules_of_the_guide_are_mixture_files(number: int, tmp_path: Path) -> None:
    assert len(MIXTURES) == 3
    path = tmp_path / "mixture.yaml"
    path.write_text(MIXTURES[number])
    mixture = read_mixture(path)
    assert mixture.curriculum == ("mixed", "sequential", "two-stage")[number]
    assert len(mixture.parts) >= 2


def test_the_guides_flags_of_ours_are_there() -> None:
    from megasft.training.arguments import help_text

    flags = set(re.findall(r"--megasft-[a-z-]+", TEXT))
    assert len(flags) > 8
    help_ = help_text()
    assert [flag for flag in sorted(flags) if flag not in help_] == []
