"""Every name and product word of the demo, and the rule, not the choice, that holds a tenth of them out."""

from __future__ import annotations

import hashlib

HELDOUT_SHARE = 0.1


def on_side(words: str, *, heldout: bool) -> str:
    """The words whose hash falls on one side. A word is on the same side wherever it stands."""
    threshold = int(HELDOUT_SHARE * 2**32)

    def is_held_out(word: str) -> bool:
        return int.from_bytes(hashlib.sha256(word.lower().encode()).digest()[:4]) < threshold

    return " ".join(word for word in words.split() if is_held_out(word) is heldout)


FIRST = """
Ava Ben Clara Daniel Elena Felix Grace Hugo Irene Jonas Karin Liam Marta Nora Oscar Paula Quentin Rosa Samuel Tara
Ursula Victor Wendy Xavier Yusuf Zoe Amir Bianca Carlos Dina Emre Fatima Gustav Hana Ivan Julia Kenji Leila Mateo
Nadia Omar Priya Rafael Sofia Tomas Uma Vera Walter Ximena Yara Zane Alma Bruno Cecilia Dmitri Esther Farid Gloria
Henrik Ines Jamal Kira Lars Mei Nils Olga Pedro Ruth Stefan Teresa Ulrich Viola Wei Yolanda Zara Anton Beatrice Cyrus
Delia Edgar Flora George Helga Isaac Joan Khalid Lydia Marcus Nina Otto Petra Ramon Selma Theo Una Vikram Willa Yvonne
Abel Brigid Colin Daphne Eli Freya Gordon Heidi Igor Jade Kofi Luna Milan Naomi Owen Phoebe Aaron Adam Adrian Agnes
Ahmed Aidan Aisha Alan Albert Alexa Alfred Alice Alicia Alison Amanda Amber Amelia Amos Amy Andrea Andrew Angela Anita
Anna Annika Antonio Ariel Arjun Arnold Arthur Ashley August Aurora Barbara Basil Benedict Bertha Bettina Bill Blake
Bridget Brian Bruce Caleb Camilla Candice Carla Carmen Carol Casper Catherine Cedric Chantal Charles Charlotte Chester
Chloe Christian Cindy Claire Claudia Clement Clifford Connor Conrad Cora Craig Crystal Curtis Cynthia Daisy Dana
Darius Darren David Dawn Deborah Denise Dennis Derek Diana Diego Dominic Donald Donna Dora Doris Dorothy Douglas
Duncan Dylan Edmund Edward Edwin Eileen Elaine Eleanor Elias Elijah Elisa Elliot Ellen Eloise Emil Emily Emma Enid
Enrique Eric Erica Ernest Ethan Eugene Eva Evelyn Fabian Faith Fay Ferdinand Fernando Fiona Flavia Florence Frances
Francis Frank Frederick Gabriel Gail Gareth Garrett Gavin Gemma Gerald Gilbert Gina Glenn Gregory Gwen Hannah Harold
Harriet Hassan Hazel Hector Helen Herbert Hilda Holly Howard Ian Ida Imran Ira Iris Isabel Ismael Ivy Jack Jacob Jaime
James Jana Janet Jared Jasmine Jason Javier Jean Jeffrey Jenna Jeremy Jerome Jesse Jessica Jill Joel Johan John Jordan
Joseph Joyce Juan Judith Julian June Justin Kaitlin Kamal Karl Kate Keith Kelly Kenneth Kevin Kieran Kirsten Kurt Kyle
Lana Laura Laurence Leah Lena Leonard Leslie Lewis Lila Lillian Linda Lionel Lisa Lorenzo Louis Lucas Lucia Lucy Luis
Luther Mabel Madeline Magnus Malcolm Manuel Marcel Margaret Maria Marian Mario Marlene Martin Marvin Mary Matilda
Matthew Maureen Maurice Max Megan Melanie Melvin Mercedes Michael Miguel Mila Mildred Mina Mitchell Moira Molly Monica
Morgan Muriel Myra Nathan Neil Nelson Nicholas Nicole Nigel Noel Noreen Norman Olive Oliver Orlando Oswald Pamela
Pascal Patricia Patrick Pauline Penelope Percy Peter Philip Polly Quincy Rachel Ralph Randolph Raymond Rebecca
Reginald Rene Ricardo Richard Rita Robert Robin Rodney Roger Roland Ronald Rosemary Roy Ruben Rufus Russell Sabrina
Sadie Sally Sandra Sara Scott Sean Sebastian Serena Seth Shane Sharon Sheila Shirley Sidney Silas Simone Spencer
Stanley Stella Stephanie Steven Susan Sven Sylvia Tamara Tanya Terence Tessa Thelma Theresa Thomas Tiffany Timothy
Tina Tobias Todd Tracy Travis Trevor Tristan Valentina Vanessa Vernon Veronica Vincent Violet Virginia Vivian Wanda
Warren Wayne Wilfred William Winston Yannick Zelda Adele Boris Celeste Damian Edith Florian Greta Harvey Ingrid Jasper
Kathleen Leon Miriam Noah Ophelia Pablo Renata Simon Talia Umberto Valerie Wesley Yasmin Zachary Astrid Bernard
Corinne Dexter Elsa Finn
"""
LAST = """
Abbott Bergman Castillo Dawson Eriksen Fischer Garcia Hansen Ibrahim Jensen Kowalski Larsen Moretti Novak Okafor Patel
Quinn Romano Schmidt Tanaka Underwood Vargas Whitaker Xu Yilmaz Zimmer Adeyemi Barros Cohen Duarte Ellison Farrell
Goldberg Haddad Ivanov Jovanovic Keller Lindqvist Mbeki Nakamura Olsen Petrov Ramirez Sandoval Takahashi Ueda Virtanen
Weber Yamada Zhang Amato Bauer Chandra Delgado Espinoza Forster Greene Holm Ismail Jacobs Kaur Lopez Marsh Nguyen
Ortega Pereira Rossi Sato Thorne Ulven Vogel Walsh Young Zeller Archer Bishop Carver Dutton Egan Fontaine Gallo Hughes
Iqbal Johansson Kimura Lambert Mendes Norris Osei Price Rahman Silva Turner Valdez Winter Banerjee Crane Dubois Falk
Gomez Hoffman Jarvis Kovacs Lund Mercer Nolan Perez Reyes Stone Tran Adams Alvarez Ashford Atkins Ayala Bailey Baldwin
Ballard Barnes Barrett Barton Bates Baxter Beck Benson Berry Bishara Black Blair Bolton Bowman Boyd Bradley Brandt
Brennan Brooks Browning Bryant Buckley Burgess Burke Burns Byrne Cabrera Calderon Cameron Campbell Cardenas Carlson
Carpenter Carroll Cervantes Chambers Chapman Chen Christensen Church Clark Clayton Coleman Collins Conway Cooper
Cortez Craft Crawford Cruz Cummings Curry Dahl Daly Daniels Davenport Davies Decker Dempsey Diaz Dolan Donovan Doyle
Drake Drummond Duffy Durham Eaton Eckhart Edwards Elkins Emerson English Estrada Everett Fairbanks Faulkner Fernandez
Field Finch Fitzgerald Fleming Fletcher Flores Foster Fowler Fraser Freeman Friedman Frost Fuller Gallagher Gardner
Gates Gentry Gilmore Glover Goodwin Graves Griffin Guerrero Guzman Hale Hamilton Hammond Harding Harmon Hart Hawkins
Hayes Heath Henderson Herrera Hess Hobbs Hodges Holland Holt Hooper Horton Houston Hubbard Huber Hunt Hurst Hutchinson
Ingalls Irving Jennings Jimenez Jung Kaplan Kato Keating Kelley Kerr Khan Kim Kirk Klimt Knight Koch Kramer Kruger
Lang Latimer Lawson Leblanc Leonardi Levine Lindgren Livingston Lowe Lozano Lynch Macias Maddox Maldonado Malone
Marquez Marshall Massey Maxwell Mayer McCarthy McDonald McKenzie Medina Meyer Middleton Miller Molina Monroe Montoya
Morales Morris Morton Moss Mueller Nash Navarro Neumann Newton Nichols Noble Novotny Nunez Andersen Becker Costa Dixon
Evans Ferrari Grant Hayashi Ingram Jackson Klein Lehmann Murphy Nilsson Owens Parker Rivera Santos Taylor Vaughn
Wright Yates Zapata Barker Chavez Dalton Ferguson Gibson Harper Kennedy
"""
ADJECTIVES = """
copper wooden blue leather folding ceramic striped portable cotton steel round silver woollen compact bamboo yellow
wireless velvet heavy glass painted canvas tall orange rubber marble quilted slim purple magnetic linen oval brass
padded vintage white electric narrow plastic woven acrylic adjustable aluminium amber antique aqua ash automatic azure
beige birch black blond bold braided bright bronze brown brushed buckled burgundy camel carbon carved cashmere cast
cedar charcoal cheap checked cherry chestnut chrome chunky classic clay clear coastal cobalt cold collapsible
colourful concrete convertible coral corded cordless cork corner cosy cream crystal cubic curved cyan damask dark
decorative deep deluxe digital dotted double dual durable ebony embroidered emerald enamel engraved ergonomic
extendable fancy faux felt firm flat fleece flexible floral fluffy foam foldable forest framed fringed frosted fuzzy
gilded ginger glazed glossy grained gold gothic handmade hanging hexagonal hollow hybrid indigo inflatable insulated
ivory jade jumbo jute khaki knitted lace lacquered lavender lilac lime lined long low luxury mahogany maple
maroon mauve matte mesh metal metallic mint miniature mobile modern modular mossy mustard natural navy
neon noisy ocean octagonal olive opal organic ornate outdoor pale paper pastel patched patterned pearl perforated
pewter pine pink plain plush pocket polished porcelain powered printed pure quiet rattan raw recycled red reusable
reversible ribbed rigid rose rosewood rough royal ruby ruffled rugged rustic rusty salmon sand satin scarlet scented
sealed sequined shallow sheer shiny short silent silicone silk simple slate sleek slotted smart smoked smooth
soft solar solid spare speckled spiral spotted stackable stained steady sturdy suede super tan tartan taupe teak thick
thin tiled tiny tinted titanium topaz tough transparent travel tribal triple turquoise tweed twin twisted ultra
upright violet walnut warm washable wavy waxed wicker wide willow wired golden crimson oak granite denim waterproof
green square nylon light iron grey
"""
# Nouns in front of a noun, so that a product may begin with almost any word.
KINDS = """
acorn airport alarm album alley almond alpine anniversary apple apricot aquarium arcade archery arctic arrow artist
atlas attic autumn avocado baby backyard badge bakery ball ballet banana bank barbecue barn baseball basement basil
basketball bathroom beach bear beaver bedroom bedside bee beetle berry bike bird birthday biscuit bison blossom
blueberry boat bonfire bonsai book border boulder bowling branch brandy bread breakfast breeze brick bridge broccoli
brook bubble buffalo bumblebee bunny burger bus business butcher butter butterfly button cabbage cabin cactus cafe
cake calendar camp campfire camping canal candy canyon captain caramel caravan cardinal caribou carnival carrot cashew
castle cat cathedral cattle cave celery cellar cello cereal champion chapel cheese chef cherub chess chicken children
chili chocolate choir christmas cider cinema cinnamon circle circus citrus city clarinet classroom clifftop climbing
clinic cloud clover coach cobra cockpit cocktail coconut coffee college comet comfort comic commuter concert condor
continental cookie cottage country county courtyard cow cowboy coyote crab cracker cricket crocodile crow crown cruise
cupcake cycling dairy dance dandelion dart decade deer dentist desert dessert diamond diner dinner dinosaur doctor dog
doll dolphin donkey door dove dragon dragonfly dream driveway duck dungeon dust eagle earth easter eclipse egg
elephant elevator elf elm engine engineer entrance equator evening event everyday executive express fabric factory
fair fairy falcon family farm farmhouse feather fence fern ferry festival fiction fiddle fig fire fireplace firefly
fish fishing fitness flag flamingo flash flight florist flour flower fog folk football forge fossil fountain fox
freight friday frog fruit fur galaxy gallery game garage garden garlic gazelle gecko gem ghost giant giraffe girls
glacier globe goat golf goose gorilla grain grape grass gravel grocery guard guest gum gymnast halloween ham hamster
harbour harvest hawk hay hedge hedgehog heritage hero heron herb hiking hill hippo hobby hockey holiday home honey
honeycomb hook horizon horse hospital hotel house hunter hunting hurricane ice icicle igloo inn insect island ivy
jaguar jam jazz jelly jellyfish jersey jogging joker journey judo juice jungle jury kangaroo kennel kid king kingdom
kitchen kitten kiwi koala laboratory lady lagoon lake lamb landscape laundry lawn lawyer leaf legend lemon lemonade
leopard library lifeguard lighthouse lily lion lizard lobby lobster locker lodge lotus lounge lunch lynx macaroon
magazine magic magnolia mail mango mansion map market marine master meadow melon mermaid meteor midnight milk mill
minibus mocha mole monkey monsoon monster monument moon moonlight moose morning mosaic mosquito moth motor mountain
mouse movie muffin mule muscle museum mushroom music mystery nature nectar nest night nightingale noodle nursery nut
nutmeg oasis oat oatmeal observatory octopus office onion opera orchard orchestra orchid organ ostrich otter owl
oyster paint palace palm pancake panda panther papaya parade paradise park parlour parrot party passenger passport
pasta pastry patio peach peacock peanut pear pebble pelican penguin pepper phoenix phone picnic pig pigeon pilot
pineapple pioneer pirate pizza plane planet plant platinum player playground plum plumber poet polar police pony pool
popcorn poppy porch potato prairie prince princess pumpkin puppy pyramid quail quarry queen quiz rabbit raccoon racing
railway rain rainbow rainforest ranch raspberry raven reading reception record reef reindeer restaurant retro rhino
rice river road robot rocket rodeo roof rooster rope rugby runner safari sailing sailor saint salad salt school
schoolyard science scorpion scout sea seahorse seal seaside season seaweed secret seed shadow shark sheep shell
shepherd shop shower sign singer skate skating ski sky sleeping sloth snail snake snow snowflake soap soccer soup
space spice spider spinach spirit sport spring spruce squash squid squirrel stable stadium stage staircase star
starfish station steam stork storm stove strawberry street studio subway sugar summer summit sun sunday sunflower
sunrise sunset surf swamp swan swimming tango tank tavern tea teacher team temple tennis terrace theatre thunder
ticket tiger toast toddler tomato tool tornado tourist tower town toy track tractor traffic trail train treasure tree
trout truck tulip tuna tundra tunnel turkey turtle twilight unicorn university urban valley vanilla vegetable village
vine vineyard visitor volcano volleyball vulture waffle waiter wall walrus waltz warehouse warrior water waterfall
wave wedding weekend whale wheat wildlife wind window wine winter wizard wolf wood wool workshop writer yacht yard
yoga yoghurt youth zebra zeppelin zigzag zodiac zoo
"""
NOUNS = """
kettle lamp chair backpack mirror clock blanket toaster vase bottle jacket desk pillow drill guitar tent wallet
speaker basket bench carpet camera bicycle blender curtain drawer fan helmet keyboard ladder mug necklace oven pan rug
saddle scarf shelf sofa stool suitcase table teapot towel tray umbrella wagon watch whistle bracelet bucket candle
cabinet charger cushion easel flute glove hammer jug kite lantern mattress microscope notebook paddle piano printer
puzzle radio ring sandal scooter spoon sweater telescope thermometer tripod trumpet violin wrench anchor apron ashtray
axe bag balloon banner barrel bathrobe bathtub beanbag bed bell belt bib binder blazer blouse boot bowl box brooch
broom brush cage cane cap cape cardigan cart case chest chisel clamp coat comb compass cooker cot couch cradle crate
crib crutch cup cupboard dish doormat dress dresser drum duvet earring envelope flask footstool fork frame freezer
fridge funnel gate goblet grater griddle grill hairbrush hamper handbag harp hat heater hoodie hose jar armchair
bookcase tablecloth hairdryer skateboard raincoat coffeepot microphone birdhouse corkscrew flashlight hammock kayak
laptop stroller sunhat toolbox vacuum mixer stapler
"""
