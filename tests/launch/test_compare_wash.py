"""launch/compare_wash.py: what is promised of an exchange, and small programs."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
  "model.vocab=256,model.embed=256,model.layers=8,model.heads=8,"
  "model.kv_heads=8,model.head_dim=32,model.mlp=1024,data.length=96"
)
CHOSEN = [
  "--model=llama 134M",
  "--row=ensemble",
  "--row=WASH 0.01",
  f"--set={SMALL}",
  "--topology=v5e:2x4",
  "--out=v5e",
]
COMMANDS = {
  "v5e": CHOSEN,
  "row": ["--row=WASH 2", "--out=row"],
  "model": ["--model=llama", "--out=model"],
}
IMPORTS = "import distrain_jax.train, distrain_jax.inspect"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("compare_wash")


@pytest.fixture(scope="module")
def ran(folder, run_launchers):
  """ran(name) -> (exit code, output, errors) of that command."""
  script = str(ROOT / "launch" / "compare_wash.py")
  commands = {name: [script, *given] for name, given in COMMANDS.items()}
  return run_launchers(commands, folder, IMPORTS)


@pytest.fixture
def comparison(monkeypatch):
  monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
  return importlib.import_module("launch.comparisons.wash")


def row(name, hardware, lives, temporaries, wanted=1.0):
  return {
    "name": name,
    "hardware": hardware,
    "parameters": 100.0,
    "exchange_bytes": lives,
    "memory": {"temporaries": temporaries, "peak": 1000.0},
    "wire_bytes": 1.05,
    "wanted": wanted,
  }


@pytest.mark.parametrize(
  ("hardware", "lives", "grown", "holds"),
  [
    ("v5e:2x4", 4.9, 30.0, True),  # activations are packed anew
    ("v5e:2x4", 5.1, -30.0, False),  # though they are packed better
    ("v5e:2x4", None, 0.0, False),
    ("h100:8", 90.0, 4.9, True),  # gradients wait meanwhile
    ("h100:8", 4.0, 5.1, False),
    ("h100:8", None, 0.0, False),
  ],
)
def test_what_an_exchange_needs_is_told_apart(
  hardware, lives, grown, holds, comparison
):
  rows = [
    row("ensemble", hardware, None, 50.0, None),
    row("WASH", hardware, lives, 50.0 + grown),
  ]
  sent, *held = comparison.claims(rows)
  assert "sends 1.050" in sent and sent.endswith(" holds.")
  promised = [x for x in held if "promised below 5%" in x]
  assert len(promised) == 1
  assert promised[0].endswith(": holds.") == holds
  assert f"{grown:+.2f}%" in held[-1]


def test_a_small_llama_holds_its_promises(ran, folder):
  code, out, err = ran("v5e")
  assert code == 0, err
  found = json.loads((folder / "v5e" / "wash_compiled.json").read_text())
  rows = {x["name"]: x for x in found["rows"].values()}
  washed, alone = rows["WASH 0.01"], rows["ensemble"]
  assert alone["exchange_bytes"] is None
  assert 0 < washed["exchange_bytes"] < 0.05 * washed["parameters"]
  assert out.count(": holds.") == 2 and "DOES NOT" not in out
  assert "| WASH 0.01 |" in out and "| ensemble |" in out


@pytest.mark.parametrize(
  ("name", "says"),
  [("row", "--row=WASH 2: one of"), ("model", "--model=llama: one of")],
)
def test_a_mistake_is_one_line(name, says, ran):
  code, out, err = ran(name)
  assert code != 0 and says in err
  assert "Traceback" not in out + err
