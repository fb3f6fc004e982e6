"""Finds what must not be published: tokens, keys, passwords, and paths that reveal whose machine a file is from."""

import re
from typing import NamedTuple

_TOKENS = {
    "a Hugging Face token": r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "an API key": r"\bsk-(?:[a-z]+-)*[A-Za-z0-9_-]{20,}",
    "an AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "an AWS secret key": r"(?i:aws_?secret_?(?:access_?)?key[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9/+]{40})",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})",
    "a Google API key": r"\bAIza[0-9A-Za-z_-]{35}",
    "a Slack token": r"\bxox[abprs]-[0-9A-Za-z-]{10,}",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
    "a password in a URL": r"://[^\s/:@\"']+:[^\s/:@\"']+@",
}
_HOME = r"(?:/home/|/Users/|[A-Za-z]:\\{1,2}Users\\{1,2})[^\s\"'<>`]+|(?<![\w/])/root/[^\s\"'<>`]+"
_SECRET = re.compile("|".join(f"(?P<t{number}>{pattern})" for number, pattern in enumerate(_TOKENS.values())))
# Vocabularies contain pieces of their training text, which can look like home folders.
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")


class Finding(NamedTuple):
    """A line that must not be published, and how to fix it."""

    file: str
    line: int
    problem: str
    fix: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.problem}; {self.fix}"


def scan(file: str, content: str) -> list[Finding]:
    """All secrets and home paths in a text file. Of a secret, only the first four characters are repeated."""
    kinds = list(_TOKENS)
    findings = []
    for number, line in enumerate(content.split("\n"), start=1):
        for match in _SECRET.finditer(line):
            kind = kinds[int(match.lastgroup[1:])]
            findings.append(
                Finding(file, number, f"{kind} ({match[0][:4]}…)", "delete it here, and revoke it where it was issued")
            )
        if file not in VOCABULARIES:
            for match in re.finditer(_HOME, line):
                findings.append(
                    Finding(file, number, f"the path {match[0]!r} of this machine", "write a relative path or a name")
                )
    return findings
