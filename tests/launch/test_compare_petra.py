"""launch/compare_petra.py: what it compiles, keeps and tells, of a small Llama."""

import json
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
ROWS = ("PETRA", "1F1B, inputs kept")
# 6 couplings, an embedding and an output on 8 stages.
SMALL = (
  "model.vocab=256,model.embed=128,model.layers=3,model.heads=4,"
  "model.kv_heads=4,model.head_dim=32,model.mlp=256,data.length=96"
)
CHOSEN = ["--network=rev_llama 134M", "--topology=h100:8", f"--set={SMALL}"]
CHOSEN += [*(f"--row={row}" for row in ROWS), "--out=out"]
COMMANDS = {
  "first": CHOSEN,
  "again": CHOSEN,
  "row": ["--network=chain", "--row=GPipe", "--out=row"],
  "network": ["--network=resnet50", "--out=network"],
  "argument": ["chain", "--out=argument"],
}
IMPORTS = "import distrain_jax.train, distrain_jax.inspect, matplotlib.figure"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("compare_petra")


@pytest.fixture(scope="module")
def ran(folder, run_launchers):
  """ran(name) -> (exit code, output, errors) of that command."""
  script = str(ROOT / "launch" / "compare_petra.py")
  commands = {name: [script, *given] for name, given in COMMANDS.items()}
  return run_launchers(commands, folder, IMPORTS)


def test_what_is_read_off_each_program(ran, folder):
  code, _, err = ran("first")
  assert code == 0, err
  found = json.loads((folder / "out" / "petra_compiled.json").read_text())
  petra, rival = found["rows"].values()
  for x in (petra, rival):
    assert x["peak"] == sum(x["parts"].values())
    assert not x["unknown"]
    assert all(m["asynchronous"] for m in x["messages"])
  stream = 4 * 96 * 128
  sizes = {m["up"]: m["bytes"] for m in petra["messages"]}
  assert sizes == {True: 2 * stream + 4 * 96, False: 4 * stream}
  # 14 rows of the embedding's tokens, in a tile; 12 of the next one's streams.
  tokens = 14 * 4 * 1024
  assert petra["parts"]["FIFO"] == tokens
  assert rival["parts"]["FIFO"] == tokens + 12 * 2 * stream
  assert petra["parts"]["model"] == rival["parts"]["model"]
  assert rival["ticks"] == 32 + 2 * 7


def test_a_table_and_a_picture_are_written(ran, folder):
  code, out, err = ran("first")
  assert code == 0, err
  lines = [x for x in out.splitlines() if x.startswith("| ")]
  heads, _, *rows = ([y.strip() for y in x.split("|")[1:-1]] for x in lines)
  assert [row[0] for row in rows] == list(ROWS)
  assert all(len(row) == len(heads) for row in rows)
  assert "Padding, mean of a stage's: params " in out
  with Image.open(folder / "out" / "petra_compiled.png") as image:
    image.load()
    assert min(image.size) > 200


def test_what_is_compiled_is_not_compiled_again(ran):
  code, out, err = ran("again")
  assert code == 0, err
  assert out == ran("first")[1]
  assert "[1/2]" in ran("first")[2] and "[1/2]" not in err


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("row", "--row=GPipe: one of PETRA, inputs kept, "),
    ("network", "--network=resnet50: one of chain, rev_llama 134M, revnet50."),
    ("argument", "unknown arguments: ['chain']"),
  ],
)
def test_a_mistake_is_told_before_anything_compiles(name, message, ran, folder):
  code, out, err = ran(name)
  assert code != 0
  assert message in out + err
  assert not (folder / name).exists()
