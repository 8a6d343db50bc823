"""Turn the Python FAQ into a labelled retrieval set: every question, with its answer as the relevant document.

    python build.py path/to/html/_sources/faq [output folder]

Needs only the standard library. README.md says where the source files come from.
"""

import json
import re
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

FILES = ["general", "design", "programming", "library", "extending", "windows", "gui", "installed"]

ONLY_A_POINTER = re.compile(r"See [^\n]*$")  # "See the next question.": not an answer
UNDERLINE = re.compile(r"(-{3,}|={3,})$")
LIST_ITEM = re.compile(r"([*-]|\d+[.)]|#\.) +")
DIRECTIVE = re.compile(r"\.\. ([\w-]+):: *(.*)")
KEEP_AS_CODE = {"code-block", "doctest", "testcode"}
KEEP_AS_TEXT = {"note", "seealso"}  # every other directive is dropped, and so are comments and link targets

# One scan over the text, so that nothing inside ``a literal`` is taken for markup.
INLINE = re.compile(
    r"``(?P<literal>.+?)``(?!`)"
    r"|:(?P<role>[a-z:]+):`(?P<target>[^`]+)`"
    r"|`(?P<link>[^`]+)`_{0,2}"
    r"|\|(?P<substitution>\w+)\|"
    r"|(?<![\w*])(?P<stars>\*\*?)(?P<emphasis>[^\s*](?:[^*]*[^\s*])?)(?P=stars)(?![\w*])"
    r"|\\(?P<escaped>.)"
)


def clean_inline(text):
    """RST inline markup to plain text."""

    def plain(match):
        found = match.groupdict()
        if found["literal"]:
            return found["literal"]
        if found["role"]:
            return plain_role(found["role"], found["target"])
        if found["escaped"]:
            return found["escaped"].strip()  # an escaped space only separates markup: it is not text
        return drop_target(found["link"] or found["substitution"] or found["emphasis"])

    return INLINE.sub(plain, text)


def drop_target(text):
    """`the text <the target>` is shown as the text."""
    return re.sub(r"(?<=\S)\s*<[^<>]*>$", "", text)


def plain_role(role, target):
    if role == "pep":
        return f"PEP {target}"
    if role == "ref" and "<" not in target:
        return target.replace("-", " ").replace("_", " ")  # a label without a text of its own
    if role == "file":
        return target.replace("{", "").replace("}", "")
    text = drop_target(target).removeprefix("!")
    return text.rsplit(".", 1)[-1] if text.startswith("~") else text


def indent_of(line):
    return len(line) - len(line.lstrip())


def take_indented(lines, start):
    """The blank or indented lines from `start` on, without their common indent, and the index after them."""
    end = start
    while end < len(lines) and (not lines[end] or indent_of(lines[end])):
        end += 1
    return textwrap.dedent("\n".join(lines[start:end])).splitlines(), end


def list_item(lines, i):
    """A match for the marker of a list item. A paragraph whose second line is not indented is no item to RST."""
    following = lines[i + 1] if i + 1 < len(lines) else ""
    continues = not following or indent_of(following) or LIST_ITEM.match(following)
    return LIST_ITEM.match(lines[i]) if continues else None


def take_item(lines, start, width):
    """The lines of a list item, whose text starts `width` columns in, and the index after them."""
    _, end = take_indented(lines, start + 1)
    return [line[width:] for line in lines[start:end]], end


def blocks(lines):
    """RST body lines to a list of plain-text blocks: paragraphs on one line, code as it stands."""
    result = []
    code_follows = False
    i = 0
    while i < len(lines):
        line = lines[i]
        if not line:
            i += 1
        elif indent_of(line):
            inner, i = take_indented(lines, i)
            result += ["\n".join(inner).strip("\n")] if code_follows else blocks(inner)
            code_follows = False
        elif line == ".." or line.startswith(".. "):
            inner, i = take_indented(lines, i + 1)
            directive = DIRECTIVE.match(line)
            name = directive[1] if directive else "comment"
            if name in KEEP_AS_CODE:
                result.append("\n".join(inner).strip("\n"))
            elif name in KEEP_AS_TEXT:
                result += blocks([directive[2], *inner])
        elif line.startswith(">>>"):
            end = next((j for j in range(i, len(lines)) if not lines[j]), len(lines))
            result.append("\n".join(lines[i:end]))
            i = end
        elif item := list_item(lines, i):
            inner, i = take_item(lines, i, width=item.end())
            first, *rest = blocks(inner)
            result += [f"{item[1]} {first}", *rest]
        else:
            end = i
            while end < len(lines) and lines[end] and not indent_of(lines[end]):
                end += 1
            paragraph = " ".join(" ".join(lines[i:end]).split())
            i = end
            code_follows = paragraph.endswith("::")
            if code_follows:
                paragraph = paragraph.removesuffix("::").rstrip()
                paragraph += ":" if paragraph else ""
            result.append(clean_inline(paragraph))
    return [block for block in result if block]


def sections(lines):
    """(heading, body lines) for every underlined heading."""
    heads = [i for i in range(len(lines) - 1) if is_heading(lines, i)]
    for head, end in pairwise([*heads, len(lines)]):
        yield lines[head], lines[head + 2 : end]


def is_heading(lines, i):
    line = lines[i]
    return bool(line and not indent_of(line) and UNDERLINE.match(lines[i + 1]) and not UNDERLINE.match(line))


def questions(path):
    """(question, answer) for every heading of one file that has a text of its own.

    A heading that only groups questions has none, so it drops out here.
    """
    lines = [line.rstrip() for line in path.read_text(encoding="utf-8").expandtabs().splitlines()]
    for heading, body in sections(lines):
        answer = "\n\n".join(blocks(body))
        if answer and not ONLY_A_POINTER.match(answer):
            yield " ".join(clean_inline(heading).split()), answer


def write_jsonl(path, rows):
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(source, output):
    documents, relevant = [], {}
    for name in FILES:
        for number, (question, answer) in enumerate(questions(source / f"{name}.rst.txt"), start=1):
            document_id = f"{name}-{number:04}"
            documents.append({"id": document_id, "text": answer})
            relevant.setdefault(question, []).append(document_id)  # a question asked twice is one query
    queries = [{"id": f"q-{ids[0]}", "text": question, "relevant": ids} for question, ids in relevant.items()]
    write_jsonl(output / "documents.jsonl", documents)
    write_jsonl(output / "queries.jsonl", queries)
    print(f"{len(documents)} documents, {len(queries)} queries")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else Path(__file__).parent)
