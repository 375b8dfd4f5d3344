# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Names for needles: an adjective and a noun, as RULER's."""

import random
from collections.abc import Iterator

_ADJECTIVES = """
able ancient angry autumn bitter black blue bold brave brief bright broken busy calm
careful cheap clean clever cloudy cold common cool crimson curious damp dark deep
delicate distant dry dusty eager early eastern empty faint famous fancy fast fierce
fine flat floral fragrant fresh frosty gentle giant glad golden grand gray green happy
heavy hidden hollow honest humble icy idle jolly kind large late lazy lively lonely
loud lucky mellow misty modern muddy narrow nervous noble northern odd orange pale
patient plain polished proud purple quick quiet rapid rare restless rough round royal
rusty salty sharp shiny silent silver sleepy small smooth snowy soft solitary southern
sparkling steep still strange strong sweet tall tame tender thin tiny twilight warm
wandering weathered western white wide wild winter wise withered young
"""
ADJECTIVES = _ADJECTIVES.split()

_NOUNS = """
acorn anchor apple arrow badge bakery balloon barn basket beach bell bench bird blanket
boat bottle bridge brush bucket butter cabin camera candle canyon carpet castle cave
chair chimney church cliff clock cloud coast coffee comet copper cottage cradle crane
creek crown curtain desert dinner door dream drum eagle engine falcon farm feather fence
field fire flower forest fountain fox garden garlic gate ghost glacier glove grape
guitar hammer harbor hat hill horse island jacket journal jungle kettle kitchen ladder
lagoon lake lamp lantern leaf lemon letter library lighthouse lion market meadow melody
mirror moon mountain museum needle notebook oak ocean orchard otter oven owl palace
paper parrot path pencil piano pillow planet plum pocket pond potato prairie puzzle
rabbit railway rain ribbon ring river road rocket rope rose saddle sailor sandwich scarf
school sea shadow shell shoe shore smoke snow spoon spring star statue stone storm
street sunset swan table teapot temple thunder ticket tiger tower train tree tunnel
umbrella valley village violin wagon walnut water waterfall wave wheel whistle willow
window wolf wood yard
"""
NOUNS = _NOUNS.split()


def names(rng: random.Random) -> Iterator[str]:
    """Different names without end: "brave-otter", longer ones when those run out."""
    seen: set[str] = set()
    while True:
        num_adjectives = 1 if len(seen) < len(ADJECTIVES) * len(NOUNS) // 2 else 2
        name = "-".join([*rng.sample(ADJECTIVES, num_adjectives), rng.choice(NOUNS)])
        if name not in seen:
            seen.add(name)
            yield name
