"""A machine for simple PTX: the GPU's code, run in NumPy.

All threads of a block go abreast, so this is for kernels whose threads neither
part ways nor talk to each other. What it does not know it refuses. Instructions
mean what NVIDIA's "Parallel Thread Execution ISA" says, https://docs.nvidia.com/
cuda/parallel-thread-execution; where that leaves the last bits open, they are
right here.
"""

import re

import numpy as np

F32, U32, U64 = np.float32, np.uint32, np.uint64
TYPES = {"f32": F32, "b32": U32, "u32": U32, "s32": U32}
TYPES |= {"b64": U64, "u64": U64, "s64": U64}
# Between threads, or of one of them: nothing that is read here.
NOTHING = ("fence", "bar", "elect", "shfl")
INTEGERS = {
  "add": np.add,
  "sub": np.subtract,
  "min": np.minimum,
  "and": np.bitwise_and,
  "or": np.bitwise_or,
  "shl": np.left_shift,
  "shr": np.right_shift,
}
FLOATS = {
  "add": np.add,
  "mul": np.multiply,
  "neg": np.negative,
  "max": np.maximum,  # of NaN, as max.NaN
  "fma": lambda a, b, c: a * b + c,
  "rsqrt": lambda a: 1 / np.sqrt(a),
  "ex2": np.exp2,
}
COMPARE = {"lt": np.less, "ne": np.not_equal, "eq": np.equal}


def parse(text):
  """Instructions (negated, predicate, kind, types, operands), and labels."""
  body = text[text.index("\n{\n") : text.index("\tret;")]
  code, labels = [], {}
  for line in body.splitlines():
    line = line.partition("//")[0].strip().rstrip(";")
    if line.endswith(":"):
      labels[line[:-1]] = len(code)
    elif line and not line.startswith((".", "{")):
      found = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?(\S+)\s*(.*)", line)
      operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", found[4])
      kind, *types = found[3].replace("::", ".").split(".")
      code.append((bool(found[1]), found[2], kind, types, operands))
  return code, labels


class Machine:
  """One block's registers, and the arrays that the kernel's pointers name."""

  def __init__(self, text, arrays, threads):
    self.code, self.labels = parse(text)
    self.threads = threads
    self.shapes, self.starts, memory = [a.shape for a in arrays], [], []
    at = 0
    for a in arrays:
      words = np.ascontiguousarray(a, F32).view(U32).ravel()
      words = np.pad(words, (0, -words.size % 64))  # they begin at 256 bytes
      self.starts.append(at)
      memory.append(words)
      at += words.size
    self.memory = np.concatenate(memory)

  def array(self, k):
    """The k-th array, as it is now."""
    shape = self.shapes[k]
    words = self.memory[self.starts[k] :][: int(np.prod(shape))]
    return words.view(F32).reshape(shape)

  def run(self, block):
    """The block of that number, from its beginning to its end."""
    self.registers, at = {}, 0
    self.registers["%tid.x"] = np.arange(self.threads, dtype=U32)
    self.registers["%ctaid.x"] = np.full(self.threads, block, U32)
    while at < len(self.code):
      negated, predicate, kind, types, operands = self.code[at]
      at += 1
      if kind == "bra":
        taken = {True}
        if predicate:
          taken = set((self.registers[predicate] != negated).tolist())
        assert len(taken) == 1, f"threads part ways at {operands}"
        at = self.labels[operands[0]] if taken.pop() else at
      elif kind not in NOTHING:
        assert not predicate, (kind, predicate)
        self.step(kind, types, *operands)

  def value(self, text, dtype):
    if text in self.registers:
      return self.registers[text].view(dtype)
    bits = U64 if dtype is U64 else U32
    number = int(text[2:], 16) if text.startswith("0f") else int(text)
    number %= 2 ** (64 if dtype is U64 else 32)
    return np.full(self.threads, number, bits).view(dtype)

  def words(self, text):
    """Where in memory [register+offset] is."""
    base, _, offset = text.strip("[]").partition("+")
    address = self.value(base, U64) + U64(int(offset or 0) % 2**64)
    assert (address % U64(4) == 0).all(), text
    return (address // U64(4)).astype(int)

  def step(self, kind, types, target, *sources):
    dtype = TYPES[types[-1]]
    if kind == "ld" and types[0] == "param":
      which = int(re.search(r"param_(\d+)", sources[0])[1])
      start = np.full(self.threads, 4 * self.starts[which], U64)
      self.registers[target] = start
    elif kind == "ld":
      where, targets = self.words(sources[0]), re.findall(r"%\w+", target)
      assert (where % len(targets) == 0).all(), f"not aligned: {sources[0]}"
      for k, name in enumerate(targets):
        self.registers[name] = self.memory[where + k]
    elif kind == "st":
      self.memory[self.words(target)] = self.value(sources[0], U32)
    elif kind == "selp":
      a, b = (self.value(x, dtype) for x in sources[:2])
      self.registers[target] = np.where(self.registers[sources[2]], a, b)
    elif kind == "setp":
      a, b = (self.value(x, dtype) for x in sources)
      self.registers[target] = COMPARE[types[0]](a, b)
    elif kind == "cvt" and dtype is not F32:
      to = TYPES[types[0]]
      self.registers[target] = self.value(sources[0], dtype).astype(to)
    else:
      self.registers[target] = self.compute(kind, types, sources, dtype)

  def compute(self, kind, types, sources, dtype):
    if kind in ("shl", "shr"):  # by a number of 32 bits
      by = self.value(sources[1], U32).astype(dtype)
      return INTEGERS[kind](self.value(sources[0], dtype), by)
    given = [self.value(x, dtype) for x in sources]
    if kind in ("mov", "cvta"):
      return given[0]
    if "wide" in types:
      assert (kind, types[-1]) == ("mul", "u32"), (kind, types)
      return given[0].astype(U64) * given[1].astype(U64)
    if dtype is not F32:
      return INTEGERS[kind](*given)
    if kind == "cvt":
      assert types == ["sat", "f32", "f32"], types
      return np.clip(given[0], F32(0), F32(1))
    assert kind != "max" or "NaN" in types
    exact = FLOATS[kind](*(x.astype(np.float64) for x in given))
    found = exact.astype(F32)
    if "rm" in types:  # rounded down
      below = np.nextafter(found, F32(-np.inf))
      found = np.where(found > exact, below, found)
    return found
