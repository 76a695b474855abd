"""Texts to probe a head with when there are none of the user's own: everyday questions and answers."""

_PROBE = (
    ("why is the sky blue", "Sunlight is scattered by the molecules of the air. Short wavelengths are scattered far more than long ones, so the light that reaches us from all directions of the sky is mostly blue, while the setting sun, seen through much more air, looks red."),
    ("how do vaccines work", "A vaccine shows the immune system a harmless part of a germ. The body answers with antibodies and memory cells, so that a later infection is recognised and fought within hours instead of days."),
    ("capital of Australia", "Canberra was founded in 1913 as a compromise between Sydney and Melbourne. It lies inland in the Australian Capital Territory and houses Parliament, the High Court and most federal departments."),
    ("how to remove a coffee stain from cotton", "Rinse the stain with cold water from the back of the fabric at once. Rub in a little liquid detergent, wait ten minutes and wash at forty degrees; dry it only when the mark is gone, because heat sets what is left."),
    ("python read csv file into dataframe", "Call pandas.read_csv with the path of the file. The first line gives the column names unless header=None is passed; sep chooses another separator and dtype fixes the types of single columns."),
    ("what causes inflation", "Prices rise when demand grows faster than supply, when energy or imports become dearer, or when much new money meets the same amount of goods. Central banks answer with higher interest rates, which slow borrowing and spending."),
    ("symptoms of iron deficiency", "Tiredness, pale skin, shortness of breath on stairs and brittle nails are common. A blood test measures ferritin and haemoglobin; treatment is a diet richer in iron or tablets for some months."),
    ("who painted the ceiling of the Sistine Chapel", "Michelangelo painted it between 1508 and 1512 for Pope Julius II. Nine scenes from Genesis run along the middle of the vault, surrounded by prophets, sibyls and the ancestors of Christ."),
    ("difference between a stack and a queue", "A stack returns the element that was added last, a queue the one that was added first. Function calls live on a stack; print jobs and breadth-first search use a queue."),
    ("best time to plant tulip bulbs", "Plant them in autumn, six weeks before the ground freezes, three times as deep as the bulb is high and with the point upwards. They need a cold winter to flower in spring."),
    ("how long does a flight from London to New York take", "About eight hours westward and seven hours back, because the jet stream blows from the west at cruising height. The distance along the great circle is 5,570 kilometres."),
    ("what is a mortgage rate lock", "The lender promises an interest rate for a fixed period, often thirty to sixty days, while the application is processed. If rates rise meanwhile the borrower keeps the lower one; extending the lock usually costs a fee."),
    ("how to tune a guitar by ear", "Press the fifth fret of the low E string and match the open A string to it. Do the same upwards, using the fourth fret from G to B, and listen for the beating between two notes to slow down and vanish."),
    ("photosynthesis equation", "Six molecules of carbon dioxide and six of water become one molecule of glucose and six of oxygen, driven by light that chlorophyll absorbs in the chloroplasts of the leaf."),
    ("when did the Berlin Wall fall", "On the evening of 9 November 1989 an official announced, earlier than planned, that travel was free at once. Crowds gathered at the crossings and the guards opened the gates; Germany was reunited eleven months later."),
    ("linux find files larger than 1 GB", "Use find with the option -size: find /var -type f -size +1G lists them, and adding -exec ls -lh shows how large each one is. The command du sorted by size tells which folders hold most."),
    ("contract termination notice period", "Either party may end this agreement by written notice of ninety days to the end of a quarter. The right to terminate for good cause without notice is not affected, in particular where payment is two months overdue."),
    ("how do tides work", "The moon pulls the near side of the earth more strongly than the far side, which raises two bulges of water. As the earth turns beneath them most coasts see two high tides a day, strongest when sun and moon stand in line."),
    ("gluten free bread recipe", "Mix rice flour, potato starch and psyllium husk with yeast, salt and lukewarm water. Let the batter rise in the tin for an hour and bake it at two hundred degrees until the crust is dark, about fifty minutes."),
    ("rules of offside in football", "A player is offside if, when the ball is played to them, they are in the other half and nearer to the goal line than both the ball and the second-last defender. Being level is not offside, nor is receiving a throw-in."),
    ("protein folding prediction", "The model takes an amino acid sequence and an alignment of related sequences and predicts the three-dimensional coordinates of every atom. Accuracy is near that of crystallography for many single domains, lower for disordered regions."),
    ("refund policy for cancelled orders", "Orders that have not been shipped can be cancelled in the account at any time, and the amount returns to the original means of payment within five working days. Opened software cannot be sent back."),
    ("what is a black hole", "Where enough mass is packed into a small space, nothing inside the event horizon can leave, not even light. Stars of more than twenty solar masses can end this way, and most galaxies hold a much heavier one at their centre."),
    ("train a puppy not to bite", "Stop playing for half a minute whenever teeth touch skin, and offer a toy instead. Short sessions, rewards for a soft mouth and enough sleep help more than scolding; most dogs give it up by five months."),
)  # fmt: skip

PROBE_QUERIES = tuple(query for query, _ in _PROBE)
PROBE_DOCUMENTS = tuple(document for _, document in _PROBE)
