"""What is noted of rows, and why rows are left out: in words, with cures. One table for all who say it.

Keys are those of the code that finds it: `Note` of `spans.py` and `Why` of `cutting.py`.
"""

from __future__ import annotations

NOTES = {
    "control tokens": "contents hold the text of control tokens, which the model takes for the real ones",
    "reasoning left out": "the template leaves out reasoning",
    "content left out": "the template leaves out a part of the contents",
    "tools left out": "the template leaves out descriptions of tools",
    "asked otherwise": "the template asks for an answer otherwise than its answers begin, such as with "
    "an opened <think>",
    "joined with the prompt": "the tokenizer joins the beginning of an answer with the prompt, so it is "
    "not learned",
}
"""What the contract notes of a row → in words."""

LEFT_OUT = {
    "truncated": "nothing to learn within data.length",
    "empty answers": "only empty answers",
    "no learned turn": "no turn that is learned",
}
"""Why a row has nothing to learn → in words, which fit behind `has`."""

LOOK = "`qadapt data preview` shows how rows are seen."
CURES = {
    "control tokens": "Take them out of the contents, if they are not meant.",
    "joined with the prompt": "Nothing, if they are few; or begin these answers otherwise, without a line "
    "break, say.",
    "truncated": "Raise data.length, or shorten what stands before the answers.",
    "empty answers": "Remove them, or fill the answers in.",
    "no learned turn": "Remove them, or change data.learn.",
}
"""What to do about either; where nothing stands: `LOOK`."""
