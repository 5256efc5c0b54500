"""Types of message fields, with what they may hold. Decoding checks them; sending does not."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta

MAX_RID_CHARS: Final = 512
# Of these, what a client may use: the number of the attempt follows (``managers/attempts.py``).
MAX_CLIENT_RID_CHARS: Final = 500
MAX_REASON_CHARS: Final = 1000
# Requests that one report lists, running and finished each.
MAX_LISTED: Final = 65_536
# Tokens that a request may grow by while it moves.
MAX_HEADROOM: Final = 65_536

WorkerId = Annotated[int, Meta(ge=0, lt=2**16)]
SequenceId = Annotated[int, Meta(ge=0, lt=2**62)]
Room = Annotated[int, Meta(ge=0, lt=2**62)]
# Tokens, slots, bytes: not negative, and sums of them stay 64-bit integers.
Count = Annotated[int, Meta(ge=0, lt=2**48)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Seconds = Annotated[float, Meta(ge=0, le=1e11)]
Milliseconds = Annotated[float, Meta(ge=0, le=1e9)]
PredictedTokens = Annotated[float, Meta(ge=0, le=1e9)]
# Between clocks of two hosts: may be negative.
ClockDifference = Annotated[float, Meta(ge=-1e9, le=1e9)]
Rid = Annotated[str, Meta(max_length=MAX_RID_CHARS)]
Reason = Annotated[str, Meta(max_length=MAX_REASON_CHARS)]
Role = Annotated[str, Meta(pattern=r"^(prefill|decode)\Z")]
PolicyName = Annotated[str, Meta(max_length=64)]
Outcome = Annotated[str, Meta(pattern=r"^(completed|refused|failed|cancelled)\Z")]
HostName = Annotated[str, Meta(max_length=255)]
Port = Annotated[int, Meta(ge=0, lt=2**16)]
Address = Annotated[str, Meta(max_length=512)]
# Names the client chose, and the like.
Label = Annotated[str, Meta(max_length=65_536)]
HttpStatus = Annotated[int, Meta(ge=100, lt=600)]
