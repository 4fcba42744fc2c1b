"""Names of many kinds, beside the paper's 48 prompts, of which 40 are bands, films and series.

1. `NAMES_BY_KIND` holds six names of each of 20 kinds. None is one of the paper's prompts or of
   `MANY_KINDS`, on which settings are chosen: what is confirmed on these names was not found there.
2. `ALL_NAMES` are all of them, `SECOND_LIST` the first three of each kind.
"""

from __future__ import annotations

from collections.abc import Mapping

NAMES_BY_KIND: Mapping[str, tuple[str, ...]] = {
    "ruler": (
        "Queen Victoria", "Julius Caesar", "Cleopatra", "Genghis Khan", "Louis XIV",
        "Winston Churchill",
    ),
    "scientist": (
        "Marie Curie", "Charles Darwin", "Galileo Galilei", "Stephen Hawking", "Nikola Tesla",
        "Louis Pasteur",
    ),
    "writer": (
        "Charles Dickens", "Jane Austen", "Ernest Hemingway", "Mark Twain", "Leo Tolstoy",
        "Edgar Allan Poe",
    ),
    "painter": (
        "Leonardo da Vinci", "Vincent van Gogh", "Pablo Picasso", "Claude Monet", "Michelangelo",
        "Rembrandt",
    ),
    "composer or singer": (
        "Wolfgang Amadeus Mozart", "Ludwig van Beethoven", "Johann Sebastian Bach",
        "Elvis Presley", "Michael Jackson", "Bob Dylan",
    ),
    "city": ("London", "Tokyo", "New York City", "Cairo", "Sydney", "Rome"),
    "country": ("Brazil", "Canada", "Egypt", "India", "Norway", "Australia"),
    "river": (
        "Nile", "Mississippi River", "Thames", "Danube", "Ganges", "Yangtze River",
    ),
    "landmark": (
        "Eiffel Tower", "Great Wall of China", "Statue of Liberty", "Taj Mahal", "Grand Canyon",
        "Stonehenge",
    ),
    "company": ("Apple Inc.", "Google", "Boeing", "Nike", "Sony", "Volkswagen"),
    "animal": ("Elephant", "Dolphin", "Penguin", "Tiger", "Butterfly", "Crocodile"),
    "plant": ("Rose", "Sunflower", "Bamboo", "Cactus", "Wheat", "Oak tree"),
    "instrument": ("Piano", "Guitar", "Flute", "Trumpet", "Cello", "Saxophone"),
    "disease": (
        "Cancer", "Malaria", "Asthma", "Tuberculosis", "Alzheimer's disease", "Influenza",
    ),
    "element": ("Oxygen", "Iron", "Hydrogen", "Carbon", "Silver", "Helium"),
    "heavenly body": ("Mars", "Saturn", "Moon", "Sun", "Milky Way", "Venus"),
    "food": ("Sushi", "Chocolate", "Bread", "Cheese", "Spaghetti", "Hamburger"),
    "sport": ("Football", "Tennis", "Swimming", "Golf", "Baseball", "Boxing"),
    "software": ("Java", "Linux", "JavaScript", "HTML", "SQL", "Microsoft Excel"),
    "religion": ("Buddhism", "Islam", "Christianity", "Hinduism", "Judaism", "Taoism"),
}  # fmt: skip
"""Six names of each kind."""
ALL_NAMES: tuple[str, ...] = tuple(name for names in NAMES_BY_KIND.values() for name in names)
"""The 120 names of the confirming test."""
SECOND_LIST: tuple[str, ...] = tuple(n for names in NAMES_BY_KIND.values() for n in names[:3])
"""60 names of 20 kinds, to set beside the paper's prompts."""
