"""Built-in texts for `quote`: short plain accounts, written for this package, of at least 22 words each."""

# ruff: noqa: E501

from __future__ import annotations

_EVAL = """
The night train to the coast was empty except for a nurse, two sleepy students and an old man who fed biscuits to a small grey dog.
Our bakery opens at five because the first loaves need three hours, and the fishermen want warm bread before their boats leave the harbour at dawn.
When the river flooded the market, farmers carried crates of apples upstairs and sold them from windows to neighbours who came past in wooden boats.
A retired teacher in our street repairs broken radios for children, asks no money, and keeps every thank-you letter in a blue tin beside his lamp.
The glacier above the village has lost half its ice in forty years, so engineers now store winter snow under sawdust to water summer fields.
My grandmother hid her recipe for plum cake inside a hymn book, and nobody found it until the church sold its old furniture last spring.
Honey bees tell each other where flowers grow by dancing on the comb, turning at an angle that shows the direction from the sun.
The museum lends violins to young players for one year, on condition that each gives a free concert in a hospital or a prison.
After the factory closed, its workers bought the machines together and began to build wheelchairs that can climb stairs without help from anybody else.
Two brothers crossed the desert with eleven camels, a broken compass and a map drawn by their father, who had never left his town.
The library cat sleeps on returned novels, wakes when the printer starts, and follows the last visitor to the door every evening before closing time.
Volcanic soil makes the tomatoes on that island so sweet that cooks from three countries compete for the harvest at an auction each August.
The mayor promised a new bridge before the election, a ferry after it, and finally one rowing boat painted in bright yellow and green.
Astronomers found a planet where it rains molten glass, with winds seven times faster than sound, around a quiet star in a northern constellation.
Our school garden grows beans, pumpkins and potatoes, and the pupils cook lunch on Fridays for parents who cannot afford a meal in town.
A storm tore the roof from the theatre during rehearsal, yet the actors continued in the rain until the final scene was properly finished.
The lighthouse keeper wrote down every passing ship for thirty years, and scientists now use his notebooks to study how fog has changed.
In winter the lake freezes so hard that trucks drive across it, while divers below cut holes to inspect pipes that carry gas south.
She learned chess from a taxi driver during long journeys to the clinic and later beat the national champion in only twenty moves.
The clock in the station runs two minutes fast on purpose, a kindness that has saved thousands of late passengers since the war ended.
The puppet theatre has only eleven seats, yet families drive from distant towns because its owner sews each costume during the show itself.
Farmers on the plateau weigh clouds with nets of fine mesh, collecting enough fog every night to fill troughs for goats and orange trees.
A blind carpenter measures planks by whistling at them, and customers swear that his drawers close more smoothly than anything from a factory.
The orchestra tuned to a kettle for one season, after the oboe player moved north and nobody dared to ask for the old pitch.
Penguins steal pebbles from their neighbours to build nests, and a biologist who painted stones red watched them travel through the entire colony.
When the elevator in the tower failed, a grocer hoisted milk, candles and newspapers to grateful tenants with a rope from the ninth floor.
The sailor learned to knit on a whaling ship, sold jumpers in every harbour, and retired with a cottage full of coloured wool.
Our bus driver knows the birthday of each pupil on his route and hides a paper star under the proper seat that morning.
The mathematician wrote her proof on a restaurant tablecloth, paid for the linen, and hung it framed above the fireplace in her kitchen.
Wolves returned to the park in January, and within ten years willows grew again along streams where hungry elk had eaten every shoot.
The smallest cinema in the country shows slapstick comedies in a converted bakery, with a pianist who accepts payment in fresh eggs and honey.
Miners found a forest of stone ferns above the coal, so the company gave the tunnel to a university and dug elsewhere instead.
He photographs the same oak every Sunday at noon, and the flickering film of thirty years shows storms, lovers, swings and slow decay.
The prison choir recorded an album of lullabies for the children of the singers, and the governor himself played the cello on two tracks.
A shepherd counts sheep with pebbles in a leather bag, moving one for each animal, and has never learned the names of numbers.
The island has no doctor, so a nurse flies in on Wednesdays with vaccines, spare glasses, library books and gossip from the capital.
Divers lifted a bronze bell from the wreck, rang it once for the drowned crew, and lowered it back into the green water.
The tax office moved into the old circus building, and clerks still find sawdust, sequins and one stubborn parrot behind the filing cabinets.
Spiders in the greenhouse do the work of three gardeners, catching flies above the orchids while tourists pay extra to see the webs glitter.
The astronaut grew a single courgette in orbit, wrote its diary for schoolchildren, and refused to eat it when the harvest finally came.
"""
_TRAIN = """
The old gardener planted walnut trees along the canal, knowing he would never taste the nuts, because his own teacher had done the same.
A fox visits the car park every evening, waits for the kitchen lights to go out, and then opens the bins with surprising patience.
The orchestra lost its luggage in Madrid and played the whole concert in borrowed jeans, to an audience that cheered for eleven minutes.
Salt was once so precious in these mountains that soldiers took it as wages, and thieves left gold coins behind to carry more of it.
My neighbour teaches swimming to adults who fear water, beginning with a bowl on a table and ending months later in the open sea.
The bridge hums when the wind comes from the west, and pianists in the town have agreed that the note is a low F.
Doctors on the island travel by horse in spring, when mud closes the roads and the only helicopter is busy with mountain rescues.
The printer refused to work until a child noticed that a tiny lizard had made its warm nest behind the paper tray last week.
Farmers here light small fires between the vines on cold April nights, so that frost does not kill the young shoots before sunrise.
The submarine in the harbour is now a hotel, where guests sleep in narrow bunks and breakfast is served beside the silent engines.
An engineer built a radio telescope from kitchen foil and chicken wire, and heard the hiss of hydrogen from the arms of our galaxy.
The village bought back its forest with money from mushrooms, concerts and a lottery whose first prize was a healthy young pig.
Elephants remember wells that they visited decades ago, and lead their thirsty calves across dry plains to places where water still rises.
The tailor keeps a drawer of lost buttons, sorted by colour, and claims that every one of them has a story worth telling.
During the strike, students drove the buses for free, got lost in every suburb, and made more friends than in two years of lectures.
The recipe asks for saffron, pepper and lamb, but sailors replaced the meat with dried fish and carried the dish around the world.
A meteor burned over the valley on Tuesday, bright enough to wake the chickens, and fragments were found in a field of barley.
The dentist paints tiny ships inside walnut shells while he waits for patients, and gives one to every child who does not cry.
Engineers moved the stone church eight hundred metres on rails because coal lay beneath it, and not a single window cracked on the way.
The marathon was won by a postman who had trained only by delivering letters on foot to farms scattered over four steep hills.
Paper boats with candles float down the river each autumn, one for every person who left the town to find work abroad.
The apprentice broke three vases before noon, glued them together with silver, and sold all of them to a tourist by the evening.
Owls hunt in complete silence because soft feathers break the air, a trick that designers copied for the blades of quiet wind turbines.
My uncle collects maps with mistakes, such as islands that never existed, rivers that flow uphill and towns named after hungry explorers.
The bakery and the bank shared one wall, so every robber who dug a tunnel came out between warm ovens and bags of flour.
A power cut stopped the lift with a bride, a plumber and a magician inside, and the wedding guests still talk about the show.
The coral near the hotel grows on sunken bicycles, which divers placed there to give small fish a shelter from hungry barracudas.
Winter apples were stored in straw under the bed, and the whole house smelled of cider until the cherry trees bloomed again.
The translator spent nine years on one poem, changed a comma on the last day, and then declared that the work was ruined.
Mountain guides tie a red scarf to the first pine above the snow line, so that returning climbers know the hut is near.
The football team trains on the roof of the supermarket, and shoppers hear muffled cheers above the shelves of rice and soup.
A retired pilot flies seeds over burned hills, dropping clay balls with acorns that sprout when the first rain softens their shell.
The accordion was found in an attic, full of love letters that told of a secret wedding and a ship to Argentina.
Computers in the first office filled a whole cellar, needed a river for cooling, and were slower than the watch on your wrist.
The ferry captain announces birds instead of stops, so regular passengers leave at the heron, the cormorant or the two white swans.
Children in the valley ski to school, hang their wet gloves above the stove, and learn arithmetic by counting avalanches on the map.
The chemist mixed a glue that failed to stick, and years later a singer used it to mark pages in his hymn book.
Camels store fat rather than water in their humps, close their nostrils against sand, and can drink a bathtub in ten minutes.
The judge let both sisters keep the piano, one for the mornings and one for the evenings, provided that neither played the trumpet.
Every May the whole street paints its doors, and the postman votes for the best colour by leaving his bicycle in front of it.
"""


def texts(split: str) -> tuple[str, ...]:
    """The texts of one split: 40 of "train", 40 of "eval"."""
    return tuple((_EVAL if split == "eval" else _TRAIN).strip().splitlines())
