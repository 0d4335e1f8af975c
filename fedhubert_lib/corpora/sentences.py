"""Sentences for the synthetic corpus: about a thousand words, many frames, and words that do not exist.

Masked prediction learns acoustics only if the words around a gap do not give away what stands in it. So three kinds of
utterance are mixed: sentences from a grammar whose slots are drawn independently, runs of words in no order, and runs
of pseudo-words built from random syllables.
"""

# Word lists read better as prose than as lists of strings.
# ruff: noqa: SIM905

import re

import numpy as np

NOUNS = """
acorn actor album anchor ankle apple apron arch army arrow artist attic aunt author autumn axe badge baker balcony
banjo barn barrel basin basket bath beach beacon beard beaver bench berry bicycle blanket blossom boat bonnet book boot
bottle boulder bowl branch bread brick bridge broom brother bucket buckle bulb bullet bundle bus butcher butter button
cabin cable cactus cage cake camel camera canal candle canoe canvas captain card carpet carriage carrot castle
cathedral cattle cave ceiling cellar chain chair chalk chapel cheese cherry chest chicken child chimney church circus
city clerk cliff cloak clock cloth cloud clover coach coal coast coat coffee coin collar college colour comb cook
copper cork corn corner cottage cotton courage cousin cow cradle crane cream creature creek crew cricket crow crowd
crown crystal cup curtain cushion dagger dairy dancer daughter dawn deck deer dentist desert desk diamond diary dinner
ditch doctor doll dolphin donkey door dove dragon drawer dream dress driver drum duck dust eagle ear earth editor egg
elbow elephant engine envelope evening eye factory falcon family farmer father feather fence fern ferry fever field fig
finger fire fish fisherman flag flame flask flint flood floor flour flower flute fog forest fork fort fountain fox
frame friend frog frost fruit furnace garden garlic gate ghost giant ginger giraffe girl glacier glass glove glue goat
goose gospel grain grape grass gravel grocer ground guard guest guide guitar gull gun hail hall hammer hand harbour
hare harp harvest hat hawk hay hazel head hearth heart hedge helmet herb hill hinge honey hood hook horn horse hotel
hour house hunter ice infant ink inn iron island ivory ivy jacket jam jar jaw jewel jockey journal journey judge jug
juice jungle keeper kettle key king kitchen kite kitten knee knife knight knot ladder lady lake lamb lamp lantern lawn
lawyer leaf leather lemon letter library lid light lily lime lion lizard lock log lord lunch machine magnet maid mango
map maple marble market marsh mask mast master mat match meadow measure medal melon merchant metal mile milk mill miner
mirror mist mole monkey month moon morning moth mother motor mountain mouse mouth mud mule muscle museum music mustard
nail napkin nation neck needle neighbour nephew nest net newspaper night noise nose nurse nut oak oar ocean office
officer oil olive onion orange orchard organ otter oven owl ox oyster paddle page paint palace palm pan panther paper
parade parcel parent park parrot path peach pearl pebble pen pencil pepper piano picture pie pig pigeon pillar pillow
pilot pine pipe pirate pistol plain planet plate pleasure plough plum pocket poem poet police pond pony porch port post
potato powder priest prince prison puddle pump pupil puppet purse puzzle queen quilt rabbit radio raft rail rain ranger
raven razor reed ribbon rice rider rifle ring river road robin rock roof room rooster root rope rose rug ruler sack
saddle sail sailor salad salt sand sausage scarf school scissors sculptor sea seal seed servant shadow shark shed sheep
shelf shell shepherd shield ship shirt shoe shop shore shoulder shovel shower silk silver singer sister skull sky sled
slope smith smoke snail snake snow soap sock soil soldier son song soup spade sparrow spider spoon spring square
squirrel stable stage stairs star statue steam stone stool storm story stove stranger straw stream street student sugar
summer sun swallow swan sword table tailor tea teacher temple tent thief thimble thorn thread throne thumb thunder
ticket tide tiger timber toast tobacco tomato tongue tool tooth torch tower town toy train traveller treasure tree
trumpet trunk tulip tunnel turkey turtle uncle valley vase veil vessel village vine vinegar violin visitor voice
volcano voyage wagon waiter wall walnut war wasp watch water wave wax weather weaver web wheat wheel whip whistle widow
wife willow wind window wine wing winter wolf wood wool worker worm yard year yolk youth zebra zipper
""".split()

VERBS = """
admired asked avoided baked beat bent blamed bought brought broke brushed built burned buried called carried carved
caught chased chose cleaned climbed closed copied counted covered crossed cut described divided drew dropped drove
enjoyed examined fed fetched filled fixed followed forgot forged found gathered gave greeted guarded guessed heard held
helped hid hired hung ignored invited joined judged kept kicked knew lifted lit loaded lost loved measured mended met
missed mixed moved named needed noticed offered opened owned packed painted passed picked planted played praised pulled
pushed raised reached read received remembered repaired rescued returned rode rubbed saved saw searched sent served
shared shook showed signed sketched smelled sold spilled stole studied threw tied took touched traced turned used
visited waited washed watched weighed wiped woke wore wrapped wrote
""".split()

INTRANSITIVE = """
appeared arrived awoke began blinked breathed coughed cried danced departed disappeared dreamed faded fell flew froze
grew grinned hesitated hummed hurried jumped knelt laughed leapt listened lived marched melted nodded paused prayed ran
rested rose sailed sang sat shivered shouted sighed skated slept slipped smiled sneezed spoke stayed stood stumbled
swam trembled vanished waited walked wandered wept whispered worked yawned
""".split()

ADJECTIVES = """
ancient angry awful awkward bald bitter black blue bold brave bright broad broken brown calm careful cheap clean clever
cold cruel curious dark deep dim dirty distant double dry dull eager early easy empty enormous faint fair famous fancy
fat fierce fine firm flat foolish foreign fragile fresh friendly frozen gentle golden grand gray green handsome happy
hard hasty heavy hollow honest hot huge humble hungry idle jolly keen kind large lazy light little lonely long loud low
lucky mad mild modern muddy narrow nasty near noisy odd old orange pale patient plain pleasant polite poor pretty proud
purple queer quick quiet rare raw red rich ripe rough round royal rude rusty sad safe sharp short shy silent simple
slender slow small smooth soft solid sour square stale steep stiff strange strong stubborn sudden sweet swift tall tame
tender thick thin tiny tired tough ugly unusual upper useful vague vast violet warm weak weary wet white wide wild wise
wooden yellow young
""".split()

ADVERBS = """
again almost already always badly barely boldly calmly clearly daily deeply eagerly early easily finally firmly gladly
happily hardly lately loudly maybe nearly never often once perhaps politely quickly quietly rarely sadly shortly slowly
softly sometimes soon suddenly surely together tomorrow twice usually yesterday
""".split()

NAMES = """
Adam Agnes Albert Alice Andrew Anna Arthur Beatrice Ben Charles Charlotte Clara Daisy David Dorothy Edgar Edith Edward
Eleanor Emma Felix Florence Frank George Grace Harold Harriet Henry Hugh Ida Isaac Jack James Jane Joan John Joseph
Joyce Julia Kate Laura Leonard Lewis Lucy Mabel Margaret Martha Mary Matthew Maud Nathan Oliver Olive Oscar Patrick Paul
Percy Peter Philip Rachel Ralph Robert Ruth Samuel Sarah Simon Sophie Stephen Susan Theodore Thomas Victor Walter Zoe
""".split()

DETERMINERS = "the a this that each every another my your his her our their some one".split()
PREPOSITIONS = """
above across after against along among around at before behind below beneath beside between beyond by during for from
in inside into near of on over past through toward under upon with within without
""".split()
CONJUNCTIONS = "and but or while because when if although until since unless".split()
NUMBERS = """
two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen twenty thirty forty fifty
sixty seventy eighty ninety hundred thousand
""".split()

SLOTS = {
    "N": NOUNS, "V": VERBS, "I": INTRANSITIVE, "A": ADJECTIVES, "R": ADVERBS, "P": NAMES, "D": DETERMINERS,
    "O": PREPOSITIONS, "C": CONJUNCTIONS, "#": NUMBERS,
}  # fmt: skip
FRAMES = (
    """
D N V D A N | D A N I O D N | P V D N R | R D N I C P V D N | D N O D N V D A A N | P C P I O D A N
O D A N P I R | # A N O D N I | D N O P V # N | P I R C V D N O D N | when D N I D N V D N | did D N V D A N
A N C A N | D A A N I | there was D N O D A N | P said D N was A C A | no N V D N | why D N R I
D N R V P C D A N I O D N | O D N D N V P | it was D A N O # N | # N C # N O D N | let D N V D N R
where is D N O D A N | they V D N C R V D N | she I O D N C D N I | he V P D A N | we V # A N O D N R
how A D N was C how A D N | nobody V D N O P | P is D N O D N | such A N R I | D A N was A C D N was R A
""".replace("\n", "|")
    .strip("| ")
    .split("|")
)

ONSETS = (
    """
b bl br ch d dr f fl fr g gl gr h j k kl kr l m n p pl pr qu r s sc sh sk sl sm sn sp st str sw t th tr tw v w y z
""".split()
    + [""]
)
NUCLEI = "a e i o u ee oo ai oa ou oi aw ar er or ea ie ow".split()
CODAS = "b ck d f g l ll m n nd ng nk nt p r rd rk rn sh ss st t th v x z ft lt mp sk".split() + [""] * 6

VOCABULARY = sorted({word for words in SLOTS.values() for word in words})


def sentence(rng: np.random.Generator) -> str:
    """One sentence from the grammar: half the time two frames joined by a conjunction."""
    frames = [FRAMES[rng.integers(len(FRAMES))]]
    if rng.random() < 0.5:
        frames += ["C", FRAMES[rng.integers(len(FRAMES))]]
    tokens = " ".join(frames).split()
    return " ".join(str(rng.choice(SLOTS[token])) if token in SLOTS else token for token in tokens)


def random_words(rng: np.random.Generator) -> str:
    """Six to sixteen words of the vocabulary in no order."""
    return " ".join(rng.choice(VOCABULARY, size=rng.integers(6, 17)))


def pseudo_words(rng: np.random.Generator) -> str:
    """Four to ten words that do not exist, of one to three random syllables."""
    return " ".join(
        "".join(str(rng.choice(ONSETS)) + str(rng.choice(NUCLEI)) + str(rng.choice(CODAS)) for _ in range(syllables))
        for syllables in rng.integers(1, 4, size=rng.integers(4, 11))
    )


def utterance(rng: np.random.Generator) -> str:
    """A text to speak: in equal parts a sentence, words in no order, pseudo-words."""
    return (sentence, random_words, pseudo_words)[rng.integers(3)](rng)


def transcript(text: str) -> str:
    """``text`` as LibriSpeech writes transcripts: upper case, letters, spaces and apostrophes."""
    return re.sub(r"[^A-Z' ]", "", text.upper())
