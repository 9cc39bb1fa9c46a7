"""Reads a pickle as data: an interpreter of its opcodes that builds containers, numbers and text.

A pickle is a program, and Python's own reader lets it call whatever it names. Here nothing is imported and no object
is called but a `Function` that the caller's table of names holds; an opcode that files of tensors do not need is
refused. Time and memory stay in proportion to the length of the file.
"""

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax_trustdiff.types import InputError

LONGEST = (
  2**22
)  # opcodes, and items of what is called with; a network of a thousand tensors has about 1e5 opcodes
KEYS = (str, bytes, int, float, bool, type(None))  # a tuple made of tuples can take for ever to hash
LITERALS = (
  "BINBYTES",
  "BINBYTES8",
  "BINFLOAT",
  "BININT",
  "BININT1",
  "BININT2",
  "BINSTRING",
  "BINUNICODE",
  "BINUNICODE8",
  "LONG1",
  "SHORT_BINBYTES",
  "SHORT_BINSTRING",
  "SHORT_BINUNICODE",
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
BROKEN = (  # what a damaged file can raise
  pickle.UnpicklingError,
  zipfile.BadZipFile,
  struct.error,
  ArithmeticError,
  AttributeError,
  EOFError,
  LookupError,
  MemoryError,
  NotImplementedError,
  RecursionError,
  TypeError,
  UnicodeError,
  ValueError,
)


class Function(NamedTuple):
  """What a name stands for that a pickle may call: with positional arguments, and never with side effects."""

  function: Callable


class Stateful:
  """What a pickle may give a state (the opcode BUILD)."""

  def set_state(self, state: Any) -> None:
    raise NotImplementedError


def load(
  file: io.BufferedIOBase,
  names: Mapping[tuple[str, str], Any],
  load_persistent: Callable[[Any], Any] | None = None,
) -> Any:
  """The object of the pickle that begins at the position of `file`, which is left behind its last opcode.

  names: {(module, name): what stands for it}; any other name is an InputError that says which one was refused.
  load_persistent: what stands for an object outside the pickle, by its identifier; None refuses all.
  An attribute state of a dictionary (the metadata of a state_dict) is left out.
  Raises InputError for what is refused and one of `BROKEN` for what is no pickle.
  """
  machine = _Machine(names, load_persistent)
  for opcode, argument, _ in pickletools.genops(file):
    machine.spend(1)
    machine.step(opcode.name, argument)
  return machine.stack.pop()


def check_key(value: Any) -> Any:
  """`value` if a dictionary may have it as a key (text or a number), else InputError."""
  if type(value) not in KEYS:
    raise InputError(f"refused: a {type(value).__name__} as a key; expected text or a number")
  return value


def one_line(text: Any, length: int = 100) -> str:
  """At most `length` printable characters of a text (or of the name of the type of anything else)."""
  text = text if isinstance(text, str) else type(text).__name__
  return "".join(c if c.isprintable() else "?" for c in text[:length])


class _Machine:
  """The stack and the memo of an unpickler. A mark puts the stack aside and begins a new one."""

  def __init__(self, names: Mapping[tuple[str, str], Any], load_persistent: Callable[[Any], Any] | None):
    self.names, self.load_persistent = names, load_persistent
    self.stack: list[Any] = []
    self.below_marks: list[list[Any]] = []
    self.memo: dict[int, Any] = {}
    self.left = LONGEST

  def spend(self, work: int) -> None:
    """InputError when the pickle has asked for more work than any file of tensors."""
    self.left -= work
    if self.left < 0:
      raise InputError(f"refused: a pickle of more than {LONGEST} opcodes, or items in its calls")

  def step(self, opcode: str, argument: Any) -> None:
    if opcode in LITERALS:
      self.stack.append(argument)
    elif opcode in CONSTANTS:
      self.stack.append(CONSTANTS[opcode])
    elif opcode in EMPTY:
      self.stack.append(EMPTY[opcode]())
    elif opcode in TUPLES:
      self.stack.append(tuple([self.stack.pop() for _ in range(TUPLES[opcode])][::-1]))
    else:
      self._step(opcode, argument)

  def _step(self, opcode: str, argument: Any) -> None:
    stack = self.stack
    match opcode:
      case "PROTO" | "FRAME" | "STOP":
        pass
      case "POP":
        stack.pop()
      case "MARK":
        self.below_marks.append(stack)
        self.stack = []
      case "TUPLE":
        self._push_after(tuple)
      case "FROZENSET":
        self._push_after(lambda values: frozenset(map(check_key, values)))
      case "APPEND":
        value = stack.pop()
        _of_type(stack[-1], list).append(value)
      case "APPENDS":
        values = self._pop_mark()
        _of_type(self.stack[-1], list).extend(values)
      case "ADDITEMS":
        values = self._pop_mark()
        _of_type(self.stack[-1], set).update(map(check_key, values))
      case "SETITEM":
        value, key = stack.pop(), stack.pop()
        _of_type(stack[-1], dict)[check_key(key)] = value
      case "SETITEMS":
        values = self._pop_mark()
        _of_type(self.stack[-1], dict).update(zip(map(check_key, values[::2]), values[1::2], strict=True))
      case "BINGET" | "LONG_BINGET":
        stack.append(self.memo[argument])
      case "BINPUT" | "LONG_BINPUT":
        self.memo[argument] = stack[-1]
      case "MEMOIZE":
        self.memo[len(self.memo)] = stack[-1]
      case "GLOBAL":
        module, _, name = argument.partition(" ")
        stack.append(self._find(module, name))
      case "STACK_GLOBAL":
        name, module = stack.pop(), stack.pop()
        stack.append(self._find(module, name))
      case "REDUCE" | "NEWOBJ":
        arguments, function = stack.pop(), stack.pop()
        stack.append(self._call(function, arguments))
      case "BUILD":
        state = stack.pop()
        _set_state(stack[-1], state)
      case "BINPERSID":
        stack.append(self._persistent(stack.pop()))
      case _:
        raise InputError(f"refused: the pickle opcode {opcode}, which no file of tensors needs")

  def _pop_mark(self) -> list[Any]:
    values, self.stack = self.stack, self.below_marks.pop()
    return values

  def _push_after(self, build: Callable[[list[Any]], Any]) -> None:
    value = build(self._pop_mark())
    self.stack.append(value)

  def _find(self, module: Any, name: Any) -> Any:
    if type(module) is not str or type(name) is not str:
      raise pickle.UnpicklingError("a name that is no text")
    if (module, name) not in self.names:
      raise InputError(
        f"refused: the file names {one_line(module)}.{one_line(name)}; only tensors, parameters and plain containers"
        " are read (save a state_dict instead of a whole object)"
      )
    return self.names[module, name]

  def _call(self, function: Any, arguments: Any) -> Any:
    if type(function) is not Function:
      raise InputError(f"refused: a call of a {type(function).__name__}")
    if type(arguments) is not tuple:
      raise pickle.UnpicklingError("a call without arguments")
    self.spend(sum(len(argument) for argument in arguments if type(argument) in (list, tuple, dict, set)))
    return function.function(*arguments)

  def _persistent(self, identifier: Any) -> Any:
    if self.load_persistent is None:
      raise InputError(f"refused: the file refers to an object outside it ({one_line(identifier)})")
    return self.load_persistent(identifier)


def _of_type(value: Any, kind: type) -> Any:
  if type(value) is not kind:
    raise pickle.UnpicklingError(f"items for a {type(value).__name__}; expected a {kind.__name__}")
  return value


def _set_state(value: Any, state: Any) -> None:
  if isinstance(value, Stateful):
    value.set_state(state)
  elif type(value) is not dict:
    raise pickle.UnpicklingError(f"a state for a {type(value).__name__}")
