"""JSON from clients as the types that it must have.

What fits its type is decoded at once. Only what does not is looked at a second time, and then:

- a field that asks for nothing is left out where the type does not know it, or does not take null. It is null, false,
  an empty text, list or object, or a value that the type lists as `neutral`;
- a whole number that is written with a fraction, as 6.0, is an integer where an integer is expected.

A field that asks for something and is not known is refused by name. A type may list names under `unsupported` that are
known, but not built here.
"""

from __future__ import annotations

import difflib
from functools import cache
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from actors.ingress.errors import ApiError, from_decoding, invalid, unsupported

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
            return self._fit_struct(value, kind, where)
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

    def _fit_struct(self, value: dict[str, Any], kind: inspect.StructType, where: str) -> dict[str, Any]:
        fields = _fields(kind.cls)
        fitted: dict[str, Any] = {}
        for name, each in value.items():
            field = fields.get(name)
            place = f"{where}.{name}" if where else name
            if field is not None:
                if each is not None or field.required or _takes_null(field.type):
                    fitted[name] = self.fit(each, field.type, place)
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


def _takes_null(kind: inspect.Type) -> bool:
    if isinstance(kind, inspect.UnionType):
        return any(isinstance(each, inspect.NoneType | inspect.AnyType) for each in kind.types)
    return isinstance(kind, inspect.NoneType | inspect.AnyType)


def unknown(place: str, name: str, known: list[str]) -> ApiError:
    """A field that is not known, with the known one that may have been meant."""
    near = difflib.get_close_matches(name.lower(), known, 1, 0.8)
    meant = f". Did you mean '{near[0]}'?" if near else ""
    return invalid(f"Unrecognized request argument supplied: {place}{meant}", place, "unknown_parameter")
