from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Frame(_message.Message):
    __slots__ = ("next", "alive", "hello", "data", "have", "closed", "at", "get", "last", "ping")
    NEXT_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    GET_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    next: int
    alive: Alive
    hello: Hello
    data: Data
    have: Have
    closed: Closed
    at: At
    get: Get
    last: Last
    ping: Ping
    def __init__(self, next: _Optional[int] = ..., alive: _Optional[_Union[Alive, _Mapping]] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., data: _Optional[_Union[Data, _Mapping]] = ..., have: _Optional[_Union[Have, _Mapping]] = ..., closed: _Optional[_Union[Closed, _Mapping]] = ..., at: _Optional[_Union[At, _Mapping]] = ..., get: _Optional[_Union[Get, _Mapping]] = ..., last: _Optional[_Union[Last, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ...) -> None: ...

class Alive(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Hello(_message.Message):
    __slots__ = ("life", "facts")
    LIFE_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    life: int
    facts: bytes
    def __init__(self, life: _Optional[int] = ..., facts: _Optional[bytes] = ...) -> None: ...

class Data(_message.Message):
    __slots__ = ("exchange", "part", "parts", "digest", "record", "payload")
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    exchange: int
    part: int
    parts: int
    digest: bytes
    record: bytes
    payload: bytes
    def __init__(self, exchange: _Optional[int] = ..., part: _Optional[int] = ..., parts: _Optional[int] = ..., digest: _Optional[bytes] = ..., record: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Have(_message.Message):
    __slots__ = ("exchange", "digest")
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    exchange: int
    digest: bytes
    def __init__(self, exchange: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class Closed(_message.Message):
    __slots__ = ("exchange", "digest")
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    exchange: int
    digest: bytes
    def __init__(self, exchange: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class At(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Get(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Last(_message.Message):
    __slots__ = ("part", "parts", "digest", "payload")
    PART_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    part: int
    parts: int
    digest: bytes
    payload: bytes
    def __init__(self, part: _Optional[int] = ..., parts: _Optional[int] = ..., digest: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
