"""JSON from clients as the types that it must have.

What fits its type is decoded at once. Only what does not is looked at a second time, and then:

- a field that asks for nothing is left out where the type does not know it. It is null, false, an empty text, list or
  object, or a value that the type lists as `neutral`. A field that is known is left out where it is null or an empty
  text, and takes none. Where there must be an object, an empty list is one without fields, as PHP's clients write it;
- an object that a type's `reshaped` knows in another shape is given the one that is expected;
- a whole number that is written with a fraction, as 6.0, is an integer where an integer is expected.

A field that asks for something and is not known is refused by name. A type may list names under `unsupported` that are
known, but not built here.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from llm_runtime.actors.ingress.errors import ApiError, from_decoding, invalid, unsupported

T = TypeVar("T")

_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError, OverflowError)
_LARGEST = 2.0**63

_MOST_PARTS = 65_536
"""A document with more values that are looked at is left as it is: nobody else is answered meanwhile."""
_PLAIN = frozenset((int, str))
"""Types of values that always stay as they are: lists may hold millions of them."""

_type_info = cache(inspect.type_info)


def decoded(data: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """A JSON document as the decoder's type. Raises ApiError."""
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        first = error
        if data.count(b"[") + data.count(b"{") > 4 * _MOST_PARTS:
            raise from_decoding(error) from None
    except _ERRORS as error:
        raise from_decoding(error) from None
    kind: Any = decoder.type
    try:
        fitted: T = msgspec.convert(_Fit().fit(msgspec.json.decode(data), _type_info(kind), ""), kind, str_keys=True)
        return fitted
    except _TooMany:
        raise from_decoding(first) from None
    except _ERRORS as error:
        raise from_decoding(error) from None


def converted(value: Any, to: type[T], param: str) -> T:
    """A part of a JSON body as the type that it must have. Raises ApiError.

    Args:
        param: where in the body it is.
    """
    try:
        return msgspec.convert(value, to, str_keys=True)
    except msgspec.ValidationError as error:
        first = error
    try:
        kind: Any = to
        return msgspec.convert(_Fit().fit(value, _type_info(kind), param), to, str_keys=True)
    except _TooMany:
        raise from_decoding(first, param) from None
    except msgspec.ValidationError as error:
        raise from_decoding(error, param) from None


def asks_for_nothing(value: Any) -> bool:
    """Whether a field of this value is as good as one that was not sent."""
    return value is None or value is False or value in ("", [], {})


class _TooMany(Exception):
    """The document has too many parts."""


class _Fit:
    """One second look."""

    def __init__(self) -> None:
        self._left = _MOST_PARTS

    def fit(self, value: Any, kind: inspect.Type, where: str) -> Any:
        """The value without what asks for nothing, so far as the type does not take it."""
        self._left -= 1
        if self._left < 0:
            raise _TooMany
        if isinstance(kind, inspect.UnionType):
            return self._fit_one(value, kind, where)
        if isinstance(kind, inspect.StructType) and isinstance(value, dict):
            value = self._reshaped(value, (kind,))
            return self._fit_struct(value, kind, where) if isinstance(value, dict) else value
        if isinstance(kind, inspect.ListType) and isinstance(value, list):
            if _PLAIN.issuperset(map(type, value)):
                return value
            return [self.fit(each, kind.item_type, f"{where}[{i}]") for i, each in enumerate(value)]
        if isinstance(kind, inspect.DictType) and isinstance(value, dict):
            return {key: self.fit(each, kind.value_type, f"{where}.{key}") for key, each in value.items()}
        if (
            isinstance(kind, inspect.IntType)
            and isinstance(value, float)
            and abs(value) < _LARGEST
            and value.is_integer()
        ):
            return int(value)
        return value

    def _fit_one(self, value: Any, union: inspect.UnionType, where: str) -> Any:
        """The value as the one type of a union that it can be."""
        if isinstance(value, dict):
            value = self._reshaped(value, union.types)
        if isinstance(value, dict):
            for kind in union.types:
                if isinstance(kind, inspect.StructType):
                    if kind.tag_field is None or value.get(kind.tag_field) == kind.tag:
                        return self._fit_struct(value, kind, where)
                elif isinstance(kind, inspect.DictType):
                    return self.fit(value, kind, where)
            return value
        wanted = inspect.ListType if isinstance(value, list) else (inspect.IntType, inspect.FloatType)
        kinds = [kind for kind in union.types if isinstance(kind, wanted)]
        return self.fit(value, kinds[0], where) if len(kinds) == 1 else value

    def _reshaped(self, value: Any, kinds: Sequence[inspect.Type]) -> Any:
        """The value in the shape that is expected, if one of the types knows it in another."""
        for kind in kinds:
            reshaped = getattr(kind.cls, "reshaped", None) if isinstance(kind, inspect.StructType) else None
            if reshaped is not None and isinstance(value, dict):
                value = reshaped(value)
        return value

    def _fit_struct(self, value: dict[str, Any], kind: inspect.StructType, where: str) -> dict[str, Any]:
        fields = _fields(kind.cls)
        fitted: dict[str, Any] = {}
        for name, each in value.items():
            field = fields.get(name)
            place = f"{where}.{name}" if where else name
            if field is not None:
                if _takes(field.type, each):
                    fitted[name] = self.fit(each, field.type, place)
                elif field.required:
                    fitted[name] = {} if isinstance(field.type, inspect.DictType) else each
            elif name == kind.tag_field or not kind.forbid_unknown_fields:
                fitted[name] = each
            elif not (asks_for_nothing(each) or each in getattr(kind.cls, "neutral", {}).get(name, ())):
                if name in getattr(kind.cls, "unsupported", ()):
                    raise unsupported(place)
                raise unknown(place, name, list(fields))
        return fitted


@cache
def _fields(struct: type[Any]) -> dict[str, inspect.Field]:
    kind = inspect.type_info(struct)
    assert isinstance(kind, inspect.StructType)
    return {field.encode_name: field for field in kind.fields}


def _takes(kind: inspect.Type, value: Any) -> bool:
    """Whether a known field keeps its value. It does not if this is nothing that its type takes: null, an empty text
    where there is none, a list without items in the place of an object, an object that lacks all it must have."""
    kinds = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    if any(isinstance(each, inspect.AnyType) for each in kinds):
        return True
    if value is None:
        return any(isinstance(each, inspect.NoneType) for each in kinds)
    if value == "":
        return any(isinstance(each, inspect.StrType) for each in kinds)
    objects = [each for each in kinds if isinstance(each, inspect.DictType | inspect.StructType)]
    if value == []:
        return not objects or any(isinstance(each, inspect.ListType) for each in kinds)
    if value == {}:
        structs = [each for each in objects if isinstance(each, inspect.StructType)]
        return len(structs) != len(objects) or not structs or any(map(_takes_no_fields, structs))
    return True


def _takes_no_fields(kind: inspect.StructType) -> bool:
    return kind.tag_field is None and not any(field.required for field in kind.fields)


def unknown(place: str, name: str, known: list[str]) -> ApiError:
    """A field that is not known, with the known one that may have been meant."""
    near = difflib.get_close_matches(name.lower(), known, 1, 0.8)
    meant = f". Did you mean '{near[0]}'?" if near else ""
    return invalid(f"Unrecognized request argument supplied: {place}{meant}", place, "unknown_parameter")
