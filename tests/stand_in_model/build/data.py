"""Turn the fetched packages into training texts: documents.jsonl, queries.jsonl and the held-out wiki.jsonl.

A query is always a text that was taken out of its document, or one that was written elsewhere (a dictionary's gloss),
so that the model can't learn to look for a copy. Python's FAQ is never read: it is evaluation data.
"""

import argparse
import hashlib
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

DEBIAN_PACKAGES = 5000  # of some 60,000: more would drown the other sources
FOLDERS = ("library", "tutorial", "howto", "reference", "using", "c-api")
SENTENCE = re.compile(r"(?<=[a-z0-9)\"”][.?!])\s+(?=[A-Z])")
PERSON = re.compile(r"\b(born|was an? [\w-]+ (?:\w+ )?(?:king|queen|writer|painter|composer|physicist|president))\b")


def held_out(title: str) -> bool:
    """True for the sixth of the articles that training never sees; decided by the title alone."""
    return hashlib.sha256(title.encode()).digest()[0] % 6 == 0


def glosses(folder: Path) -> dict[str, list[str]]:
    """WordNet's nouns, as lower-case lemma -> glosses without examples."""
    found: dict[str, list[str]] = {}
    for line in (folder / "debian/usr/share/wordnet/data.noun").read_text(encoding="latin-1").splitlines():
        if line.startswith(" "):  # the licence at the top of the file
            continue
        fields, _, gloss = line.partition(" | ")
        words = fields.split()
        gloss = gloss.split('; "')[0].strip()
        for word in words[4 : 4 + 2 * int(words[3], 16) : 2]:
            found.setdefault(word.replace("_", " ").lower(), []).append(gloss)
    return found


def wiki(folder: Path, rng: random.Random) -> Iterator[tuple[str, list[str], str, list[str]]]:
    """(title, sentences, kind of question, queries written elsewhere) of each article."""
    path = next(folder.glob("wiki/*/data/summaries_en-us.json"))
    lemmas = glosses(folder)
    for title, article in json.loads(path.read_text(encoding="utf-8")).items():
        sentences = SENTENCE.split(" ".join(article["extract"].split()))
        if len(" ".join(sentences)) < 100:
            continue
        senses = lemmas.get(title.lower(), [])
        # With several senses, only a gloss that shares words with the article can be about it.
        words = set(re.findall(r"[a-z]{4,}", article["extract"].lower()))
        shared = [(len(words & set(re.findall(r"[a-z]{4,}", gloss))), gloss) for gloss in senses]
        elsewhere = [gloss for score, gloss in sorted(shared, reverse=True)[:1] if score >= 1 and len(gloss) > 20]
        description = article.get("description") or ""
        # "1968 film by Stanley Kubrick" is a query; "Art movement" fits a hundred articles.
        if len(description.split()) >= 4:
            elsewhere.append(description)
        yield title, sentences, "Who was" if PERSON.search(sentences[0]) else "What is", elsewhere


def plain(text: str) -> str:
    """reStructuredText without its markup."""
    text = re.sub(
        r"^\s*\.\. (?:versionadded|versionchanged|deprecated|index|_|sectionauthor|module|highlight).*$",
        "",
        text,
        flags=re.M,
    )
    text = re.sub(r"^\s*(?:\.\. [\w-]+::|:[\w ]+: |>>>|\.\.\. |\*\*Source code:).*$", "", text, flags=re.M)
    text = re.sub(r"[-=~]{4,}", "", text)
    text = re.sub(r":[\w:-]+:`[!~.]?([^`<]+?)(?:\s*<[^`>]*>)?`", r"\1", text)
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`_+", r"\1", text)
    return " ".join(re.sub(r"\*\*|``|`_*|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)|::", "", text).split())


def python_docs(folder: Path) -> Iterator[tuple[str, str]]:
    """(heading, text) of the sections, functions and classes in Python's documentation, except the FAQ."""
    sources = folder / "debian/usr/share/doc/python3.11/html/_sources"
    heading = re.compile(r"^(?=[^\n]*\w)([^\n]+)\n([=\-~^*\"#+])\2{2,}\n", re.M)
    entry = re.compile(
        r"^( *)\.\. (?:\w+:)?(?:function|method|class|exception|classmethod|decorator|option|cfunction):: "
        r"([^\n]+)\n((?:\1 +\S[^\n]*\n|[ \t]*\n)+)",
        re.M,
    )
    for name in FOLDERS:
        for path in sorted((sources / name).rglob("*.rst.txt")):
            source = path.read_text(encoding="utf-8")
            module = re.search(r":mod:`(\w[\w.]*)`", source)
            for _, signature, body in entry.findall(source):
                body = plain(body)
                if len(body) > 120:
                    where = f"{module[1]}: " if module and name == "library" else ""
                    yield f"{where}{plain(signature)}", body
            parts = heading.split(entry.sub("", source))
            for title, body in zip(parts[1::3], parts[3::3], strict=True):
                body = plain(body)
                if len(body) > 200:
                    yield plain(title), body


def debian(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(name, synopsis, long description) of packages that describe themselves and not only their place in a suite."""
    seen = set()
    for block in (folder / "packages.txt").read_text(encoding="utf-8").split("\n\n"):
        match = re.search(r"^Package: (\S+)\n.*^Description-en: ([^\n]+)\n((?: [^\n]*\n?)+)", block, re.M | re.S)
        if not match or re.search(r"-(?:dev|dbg|doc|data|common)$|^(?:lib(?:rust|ghc)|node-|golang)", match[1]):
            continue
        text = " ".join(match[3].replace("\n .\n", "\n").split())
        if len(text) > 200 and text[:150] not in seen:
            seen.add(text[:150])
            yield match[1], match[2], text


def build(folder: Path, out: Path) -> None:
    """Write the three files."""
    rng = random.Random(1)
    documents: list[dict] = []
    queries: list[dict] = []
    evaluation: list[dict] = []

    def add(document: str, source: str, texts: list[str]) -> None:
        queries.extend({"text": text, "document": len(documents), "source": source} for text in texts)
        documents.append({"text": document, "source": source})

    for title, sentences, question, elsewhere in wiki(folder, rng):
        if held_out(title):
            evaluation.append({"title": title, "text": " ".join(sentences), "queries": elsewhere[:1]})
            continue
        texts = list(elsewhere)
        if len(sentences) >= 3 and rng.random() < 0.6:
            # A sentence of the article asks for the rest of it. The first one says what it is about, so it is the best.
            taken = sentences.pop(0 if rng.random() < 0.7 else rng.randrange(1, len(sentences)))
            texts.append(taken)
        name = title if title[1:2].isupper() or " " in title else title.lower()
        texts.append(
            rng.choice(
                [
                    title,
                    f"{question} {name}?",
                    f"{question} {name}?",
                    f"Tell me about {name}.",
                    f"Why is {name} important?",
                    f"history of {name}",
                ]
            )
        )
        add(" ".join(sentences), "wiki", texts)
    for title, body in python_docs(folder):
        first, *rest = SENTENCE.split(body)
        texts = []
        if rest and len(" ".join(rest)) > 150 and 20 < len(first) < 250:
            first = first.removeprefix("* ")
            verb = re.match(
                r"(?:Return|Create|Get|Set|Open|Read|Write|Print|Convert|Find|Remove|Add|Run|Send)\b", first
            )
            texts.append("How do I " + first[0].lower() + first[1:].rstrip(".") + "?" if verb else first)
            body = " ".join(rest)
        if title and not re.search(r"[(:]", title):
            texts.append(rng.choice([title, f"How does {title} work?", f"What is {title} in Python?"]))
        add(f"{title}. {body}"[:1500], "python", texts)
    packages = sorted(debian(folder))
    for name, synopsis, text in rng.sample(packages, min(DEBIAN_PACKAGES, len(packages))):
        add(
            f"{name}: {text}" if rng.random() < 0.3 else text,
            "debian",
            [rng.choice([synopsis, f"Which package is a {synopsis}?", f"software for {synopsis}"])],
        )
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("documents", documents), ("queries", queries), ("wiki", evaluation)):
        with (out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", type=Path, help="the folder that fetch.sh filled")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    build(arguments.packages, arguments.out)
