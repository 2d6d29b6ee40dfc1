"""Which installed distributions may be trained on: MIT, BSD, Apache, ISC and PSF licences only."""

import re
from importlib.metadata import PackageMetadata

_PERMITTED_ID = re.compile(
    r"(MIT|MIT-0|MIT-CMU|0BSD|BSD(-\d-Clause(-\w+)*)?|Apache(-[12]\.\d)?|ISC|PSF(-2\.0)?|Python-2\.0(\.1)?)",
    re.IGNORECASE,
)
_PERMITTED_CLASSIFIER = re.compile(
    r"MIT License|MIT No Attribution License|BSD License|Apache Software License|ISC License|"
    r"Python Software Foundation License"
)
_PERMITTED_NAME = re.compile(
    r"\W*(The )?((New|Modified|Simplified|Revised|[23]-Clause) )?"
    r"(MIT|BSD|Apache|ISC|PSF|Python Software Foundation)\b",
    re.IGNORECASE,
)
_PERMITTED_TEXT = re.compile(
    r"Permission is hereby granted, free of charge|Redistribution and use in source and binary forms|"
    r"Permission to use, copy, modify, and(/or)? distribute this software"
)
# A free-text field that also names one of these is not decided by its first words.
_OTHER = re.compile(
    r"GPL|General Public|MPL|Mozilla|EPL|Eclipse|CDDL|proprietary|commercial|NVIDIA|EULA|Creative Commons|CC-BY",
    re.IGNORECASE,
)


def permitted_licence(metadata: PackageMetadata) -> str | None:
    """The licence's name when it is permitted, else None.

    The first informative field decides: License-Expression (SPDX), the License classifiers, the License text.
    """
    expression = _field(metadata, "License-Expression")
    if expression:
        return expression if _expression_permitted(expression) else None
    classifiers = [
        line.split("::")[-1].strip() for line in metadata.get_all("Classifier") or [] if line.startswith("License ::")
    ]
    classifiers = [name for name in classifiers if name not in ("OSI Approved", "DFSG approved")]  # name no licence
    if classifiers:
        return " AND ".join(classifiers) if all(map(_PERMITTED_CLASSIFIER.search, classifiers)) else None
    text = _field(metadata, "License")
    if text and not _OTHER.search(text) and (_PERMITTED_NAME.match(text) or _PERMITTED_TEXT.search(text)):
        return " ".join(text.splitlines()[0].split())[:80]
    return None


def _field(metadata: PackageMetadata, name: str) -> str:
    return str((metadata.get_all(name) or [""])[0]).strip()


def _expression_permitted(expression: str) -> bool:
    """SPDX: one side of OR is enough, AND needs both, WITH only adds permissions."""
    tokens = re.findall(r"[()]|[^\s()]+", expression)

    def either() -> bool:
        permitted = both()
        while tokens and tokens[0].upper() == "OR":
            tokens.pop(0)
            permitted = both() or permitted
        return permitted

    def both() -> bool:
        permitted = single()
        while tokens and tokens[0].upper() == "AND":
            tokens.pop(0)
            permitted = single() and permitted
        return permitted

    def single() -> bool:
        token = tokens.pop(0) if tokens else ""
        if token == "(":
            permitted = either()
            if tokens:
                tokens.pop(0)
        else:
            permitted = bool(_PERMITTED_ID.fullmatch(token))
        if tokens and tokens[0].upper() == "WITH":
            del tokens[:2]
        return permitted

    permitted = either()
    return permitted and not tokens
