"""The words of the worlds: short, and within a list no two begin with the same two letters."""

NAMES = tuple(
    "Ann Amy Ben Bob Cal Cleo Dan Dora Eva Emma Gus Gina Hal Hugo Ida Ivan "
    "Jim Jack Kim Kate Leo Luke Max Mia Ned Nina Pam Ray Sue Tom Vic Zoe".split()
)
GOODS = tuple(
    "tea tin tar jam silk salt soap rice rope rum milk meat malt gold glue iron "
    "ink ice wool wax clay coal flax fish hay hemp lead lime oil pork zinc beer".split()
)
TOWNS = tuple(
    "Oslo Rome Bath Cork Lima Nice Bonn Riga York Lyon Pisa Cairo "
    "Delhi Kyoto Quito Turin Milan Leeds Essen Dover Faro Graz Hull Paris".split()
)
THINGS = tuple("cups pens hats eggs nuts keys maps pots bags jars figs pies dogs cats owls toys".split())
NUMBERS = tuple("two three four five six seven eight nine ten eleven twelve".split())

FILLERS = (
    "The sun is up.",
    "It is cold.",
    "It is late.",
    "Rain fell all day.",
    "The wind blew hard.",
    "A dog ran by.",
    "The road is long.",
    "No one came.",
    "The old clock is slow.",
    "A door was open.",
    "The moon is full.",
    "Birds sang in the trees.",
    "Snow lay on the hills.",
    "All was still.",
    "The night was dark.",
    "A bell rang twice.",
    "{name} is tired.",
    "{name} sang a song.",
    "{name} likes {good}.",
    "{name} was late.",
    "The {good} is dear.",
    "{town} is far.",
    "{town} is old.",
    "The road to {town} is wet.",
)
