import json
import sys

import pytest
import torch
import trawl_cli

from trawl.decompose import TensorSlices, spectrum
from trawl.errors import ShapeError


def planted(inner, hidden, values, dtype=torch.float32):
    """A matrix with given singular values."""
    generator = torch.Generator().manual_seed(0)
    count = len(values)
    left = torch.linalg.qr(torch.randn(inner, count, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(hidden, count, generator=generator, dtype=torch.float64))[0]
    return ((left * torch.as_tensor(values, dtype=torch.float64)) @ right.T).to(dtype)[None]


@pytest.mark.parametrize("shape", [(200, 60), (60, 200)])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e15])
def test_a_small_side_gives_every_singular_value(shape, scale):
    torch.manual_seed(0)
    x = torch.randn(1, *shape) * scale
    found = spectrum(TensorSlices(x), count=10)
    expected = torch.linalg.svdvals(x[0].double())
    assert found.exact
    torch.testing.assert_close(found.values.double(), expected, rtol=1e-4, atol=0)
    energy = float(expected.square().sum())
    assert found.stable_rank == pytest.approx(energy / float(expected[0]) ** 2, rel=1e-4)
    assert found.effective_rank == pytest.approx(energy**2 / float((expected**4).sum()), rel=1e-4)
    assert found.energy_at(10) == pytest.approx(float(expected[:10].square().sum()) / energy, rel=1e-4)


@pytest.mark.parametrize("shape", [(1500, 1100), (1100, 1500)])
def test_a_sketch_comes_close_from_below(shape):
    values = torch.arange(1, 1101).double() ** -0.7
    found = spectrum(TensorSlices(planted(*shape, values)), count=64)
    assert not found.exact
    assert len(found.values) == 64
    ratio = found.values.double() / values[:64]
    assert ratio.max() < 1 + 1e-4
    assert ratio[:16].min() > 0.99
    assert found.energy == pytest.approx(float(values.square().sum()), rel=1e-4)
    assert found.effective_rank == pytest.approx(float(values.square().sum() ** 2 / (values**4).sum()), rel=0.2)


def test_zeros_and_stacks():
    zero = spectrum(TensorSlices(torch.zeros(1, 30, 20)))
    assert (zero.stable_rank, zero.effective_rank, zero.energy_at(5)) == (0.0, 0.0, 0.0)
    with pytest.raises(ShapeError, match="of one matrix"):
        spectrum(TensorSlices(torch.ones(2, 3, 3)))


def test_the_command_prints_and_draws(zoo, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra: pip install 'trawl-llm[plot]'")
    picture = tmp_path / "spectra.png"
    folder = str(zoo("llama"))
    capsys.readouterr()
    arguments = ["trawl", "inspect", folder, "--spectra", "--layers", "1", "--roles", "fc,q", "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--json"])
    trawl_cli.main()
    found = json.loads(capsys.readouterr().out)
    assert [(item["layer"], item["role"]) for item in found] == [(1, "q"), (1, "gate"), (1, "up"), (1, "down")]
    assert all(0 < item["energy"]["16"] <= item["energy"]["64"] <= 1 for item in found)
    assert picture.read_bytes().startswith(b"\x89PNG")
    for place in (tmp_path, tmp_path / "absent" / "spectra.png"):
        monkeypatch.setattr(sys, "argv", [*arguments[:-1], str(place)])
        with pytest.raises(SystemExit) as ended:
            trawl_cli.main()
        assert ended.value.code == 2
        assert "is no file in a folder that is there" in " ".join(capsys.readouterr().err.split())
