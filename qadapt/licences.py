"""Which files of a folder or a repository say on what terms it may be used, by their names."""

from __future__ import annotations

import re

_NAME = re.compile(
    r"(\w+[-_])?(licen[cs]e|notice|copying|use_policy)s?([-_]\w+)*(\.(txt|md|rst|pdf|html))?", re.IGNORECASE
)


def is_licence(name: str) -> bool:
    """Whether a file holds terms of use, such as LICENSE, licence.md, NOTICE.txt, MODEL_LICENSE."""
    return _NAME.fullmatch(name) is not None
