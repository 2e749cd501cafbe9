"""Every notebook is its text script, and runs from top to bottom."""

import re
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def test_scripts_and_notebooks_come_in_pairs():
  assert NOTEBOOKS
  assert [p.stem for p in NOTEBOOKS] == [p.stem for p in SCRIPTS]


@each_notebook
def test_a_notebook_is_what_jupytext_makes_of_its_script(path):
  kept = nbformat.read(path, as_version=4)
  nbformat.validate(kept)
  made = jupytext.read(path.with_suffix(".py"), fmt="py:percent")
  # Cells' ids are drawn anew whenever a notebook is made.
  cells = lambda notebook: [(c.cell_type, c.source) for c in notebook.cells]
  name = path.relative_to(ROOT)
  again = f"jupytext --update --to ipynb {name.with_suffix('.py')}"
  assert cells(kept) == cells(made), f"make it again: {again}"
  for cell in kept.cells:
    assert not cell.get("outputs") and not cell.get("execution_count"), (
      f"{name} was saved with outputs; delete it and {again}"
    )


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
  """outputs(name) -> (what a notebook prints, its number of pictures)."""
  found = {}

  def run(name):
    if name not in found:
      home = tmp_path_factory.mktemp(name)
      found[name] = executed(ROOT / "notebooks" / f"{name}.ipynb", home)
    return found[name]

  return run


def executed(path, home):
  """Raises the first error of a cell, with its traceback."""
  notebook = nbformat.read(path, as_version=4)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_NUM_CPU_DEVICES", "8")
    patch.setenv("IPYTHONDIR", str(home))
    patch.setenv("JUPYTER_RUNTIME_DIR", str(home))
    nbclient.NotebookClient(
      notebook,
      kernel_name="python3",  # of this environment
      timeout=300,
      resources={"metadata": {"path": str(home)}},
    ).execute()
  each = [o for cell in notebook.cells for o in cell.get("outputs", [])]
  text = "".join(o.text for o in each if o.get("name") == "stdout")
  return text, sum("image/png" in o.get("data", {}) for o in each)


@each_notebook
def test_a_notebook_runs_from_top_to_bottom(path, outputs):
  text, pictures = outputs(path.stem)
  assert text and pictures


def test_acco_shows_what_its_text_says(outputs):
  text, _ = outputs("acco")
  number = lambda pattern: float(re.search(pattern, text)[1])
  # Equal halves: DDP to rounding, which DPU is not.
  assert number(r"\nacco +(\S+e-\d+)\n") < 1e-5
  assert number(r"\ndpu +(\S+e-\d+)\n") > 1e-2
  assert number(r"noise makes +(\S+)") == 0
  assert number(r"Tm / Tc = 0.5000: acco is (\S+) times") == 1.5
  assert number(r"\nacco .*of which exposed (\S+) ms") == 0
  assert number(r"\nzero1 .*of which exposed (\S+) ms") > 0.1
  assert "8 device(s)" in text


def test_sdp_shows_what_its_text_says(outputs):
  text, _ = outputs("sdp")
  number = lambda pattern: float(re.search(pattern, text)[1])
  assert text.count("a worker holds {32}, each has {4} holders") == 4
  assert "layers, cyclic                     a worker holds {4}, each" in text
  assert number(r"neuron level, after .*: (\S+) apart from DDP") < 1e-5
  assert number(r"block level, after .*: (\S+) apart from DDP") < 1e-5
  assert re.search(r"block 1/4 +2x32x64 +10,560 ", text)
  # Equal operations; the whole falls behind its parts; what rescaling does.
  after = r"{} +training loss .*, after \d+ (\S+)\n"
  ddp = number(after.format("ddp"))
  for level in ("neuron", "block"):
    assert number(after.format(f"{level} 1/2")) < ddp
    whole = number(rf"{level} 1/4 +whole (\S+)")
    assert whole > 1.1 * number(rf"{level} 1/4 .* workers (\S+)")
  loss = lambda how: number(rf"rescale={how} +training loss (\S+)")
  assert max(loss("train"), loss("test")) < loss("none")
  # state, temporaries, FLOPs, sent
  row = lambda name: re.search(rf"\n{name} +(\S+) +(\S+) +(\S+) +(\S+)", text)
  fsdp, half = (map(float, row(x).groups()) for x in ("fsdp", "sdp 1/2"))
  (kept, _, flops, sent), (more, small, less, fewer) = fsdp, half
  assert kept < more and flops == 1 and sent > 1
  assert small < 0.8 and less == pytest.approx(0.5, abs=0.02) and fewer < 0.5
  assert "8 device(s)" in text


def test_petra_shows_what_its_text_says(outputs):
  text, pictures = outputs("petra")
  number = lambda pattern: float(re.search(pattern, text)[1])
  assert pictures == 2
  assert text.count("its input comes back to") == 6
  # First gradients after 2 (J - 1) - s ticks; a drain has them all.
  for tick, seen in ((2, "0, 0, 0, 0"), (3, "0, 0, 0, 1"), (6, "1, 2, 3, 4")):
    assert re.search(rf"\n +{tick} +\[{seen}\] ", text)
  assert "after it                    [10, 10, 10, 10]" in text
  assert number(r"update of the pipeline: (\S+) apart") < 1e-6
  # Behind the exact gradient, least where parameters move least.
  loss = lambda run: number(rf"\n{run}:  training loss (\S+)")
  gaps = [
    loss(f"petra    {how}") / loss(f"pipeline {how}")
    for how in ("k = 1, rate 0.02", "k = 4, rate 0.02", "k = 4, rate 0.08")
  ]
  assert 1 < gaps[1] < 2.5 and min(gaps[0], gaps[2]) > 2.5
  assert number(r"petra, once full +(\S+) per micro-batch") == 4
  assert number(r"pipeline, M = 4 +(\S+) per micro-batch") == 3 * (1 + 3 / 4)
  # MB: kept by four stages, room for it, all
  row = lambda name: re.search(rf"\n{name}((?: +\d+){{6}})\n", text)[1].split()
  chain, one, none = (
    list(map(int, row(f"{name} +none")))
    for name in ("reversible", "block_2 is not", "none is")
  )
  assert chain[1:4] == [0, 0, 0] and one[2:4] == [0, 0] and one[1] > 100
  assert one[4] == pytest.approx(one[1], abs=1)  # as long as the longest
  assert none == list(map(int, row("reversible +input")))
  assert "2 pipeline(s) of 4 stage(s), 8 device(s)" in text


def test_wash_shows_what_its_text_says(outputs):
  text, pictures = outputs("wash")
  number = lambda pattern: float(re.search(pattern, text)[1])
  assert pictures == 3
  # A shuffle moves neither the average nor the distance from it.
  assert text.count("average {1.5}, squared distance from it 50.0") == 4
  assert "after  0 steps: 100% where they were" in text
  assert number(r"after 20 steps: +(\d+)% where they were") < 45
  # accuracy of the ensemble and the average; losses of both
  row = lambda name: re.search(
    rf"\n{name} +accuracy .* (\S+) +(\S+)\n +loss +(\S+) +(\S+) .* (\S+)\)",
    text,
  )
  found = {x: [*map(float, row(x).groups())] for x in ("ensemble", "wash")}
  together, useless, best, large, apart = found["ensemble"]
  _, average, _, small, near = found["wash"]
  assert useless < 0.7 and large > 10 * best
  assert average > together - 0.02 and small < 2 * best
  assert near > 0.7 * apart
  assert number(r"ensemble +barrier (\S+),") > 0.1
  assert number(r"wash +barrier (\S+),") < 0.02
  assert re.search(r"ensemble +soup of members \(\d,\)", text)
  bytes_of = lambda x: number(rf"\n{x} +\S+ bytes a step, (\S+) of DDP")
  assert bytes_of("wash") < 0.01 and bytes_of("ensemble") < 0.001
  assert bytes_of("papa") == pytest.approx(0.1, abs=0.001)
  assert bytes_of("sparta") == pytest.approx(0.02, abs=0.001)
  assert text.count("members [0, 1, 3] are as they were: True") == 2
  assert "after 800 steps" in text
  assert "8 members on 8 device(s)" in text


def test_mulo_shows_what_its_text_says(outputs):
  text, _ = outputs("mulo")
  last = lambda name: [
    float(x) for x in re.search(rf"\n{name} +(.*)\n", text)[1].split()
  ]
  narrow, wide = last("mulo")
  assert wide < narrow
  narrow, wide = last("its twin without μP")
  assert wide > narrow
  assert narrow < last("mulo")[0] and wide > last("mulo")[1]
  plain, mup = re.findall(r"512 wide over 64 wide: (.*)", text)
  growth = lambda line: [float(x) for x in re.findall(r" (\d+\.\d+)", line)]
  assert max(growth(plain)) > 3
  assert all(1 / 1.3 < x < 1.3 for x in growth(mup))
  assert float(re.search(r"difference of a weight: (\S+)", text)[1]) < 1e-4
