"""Rewrites the constructs of CUDA C++ that are not C++, for the emulator beside this file.

    python translate.py KERNEL.cu OUTPUT.cpp

Lines keep their numbers. Everything else in a source is left as it is.
"""

import re
import sys
from pathlib import Path

COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
ALIGN = r"(?:(?:alignas|__align__)\s*\([^()]*(?:\([^()]*\))?[^()]*\)\s*)?"
DYNAMIC = re.compile(
    rf"extern\s+(?:{ALIGN}__shared__\s+{ALIGN})([\w:\s<>,]+?)\s*\b(\w+)\s*\[\s*\]\s*;"
)
STATIC = re.compile(
    rf"({ALIGN})__shared__\s+({ALIGN}(?:[\w:]|<[^;]*?>|\s)+?)\s*\b(\w+)\s*((?:\[[^\]]*\]\s*)*);"
)
LAUNCH = re.compile(r"([\w:]+(?:<[^<>;]*>)?)\s*<<<(.*?)>>>\s*\((\s*\))?", re.DOTALL)


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0]) if match[0][0] == "/" else match[0]


def translate(source: str) -> str:
    source = COMMENT_OR_STRING.sub(_blank, source)
    source = DYNAMIC.sub(
        r"[[maybe_unused]] static \1* const \2 = "
        r"reinterpret_cast<\1*>(::cuda_emulator::dynamic_shared);",
        source,
    )
    source = STATIC.sub(
        r"\1static \2 \3\4; ::cuda_emulator::shared_variable(&\3, sizeof \3);", source
    )
    return LAUNCH.sub(
        lambda m: f"::cuda_emulator::Launch({m[2]})({m[1]}{')' if m[3] else ', '}", source
    )


def main() -> None:
    source, output = map(Path, sys.argv[1:])
    output.write_text(f'#line 1 "{source}"\n{translate(source.read_text())}')


if __name__ == "__main__":
    main()
