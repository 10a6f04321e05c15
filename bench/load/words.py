"""Common English words, most of them one token in the usual vocabularies: what prompts are made of."""

from __future__ import annotations

_TEXT = """
ability action activity age agency air amount analysis animal answer apple approach area arm art article artist
attack author baby back bag ball bank beach bed behavior bell belt benefit bike bill bird blade block blood board
boat body bone book bottle box boy brain bread bridge brother building bus business button cable cake call camera
campaign car card care career case cell center century chain chair chance change chapter chart chest child choice
church city claim class clock cloud coat code coffee cold college color column company computer concern control corn
cost country couple course court crime culture cup dance dark data day deal death decade decision degree desert
design desk dinner director disease doctor dog door dress drill drug drum dust ear earth east economy effect effort
egg election end energy engine event evidence example eye face fact factor fall family farm father feeling field
figure file film finger fire fish floor flower folder foot force forest form friend fruit fund future game garden
gear girl glass goal gold graph grass ground group growth guitar gun guy hair hammer hand hat head health heart heat
hill history home horse hospital hour house husband ice idea image industry interest iron island issue job key kind
king kitchen knee knife lake lamp land language law lawyer layer lead leader leaf leg letter level life light line
lip list look loss lot love lunch lung machine magazine man manager map market material matter meat media meeting
member memory message metal milk mind minute moment money month moon morning mother mountain mouse movement movie
muscle music nail name nation nature neck need nerve network news night noise north nose note novel number office
officer official oil order page paint paper parent part party patient people period person phone photo piano picture
piece pipe place plan plane plant plate player pocket poem point police policy position power practice pressure
price problem product program project pump quality question race radio rain rate reason record region report
research resource response rest result rice right ring risk river road rock role room root rope rose row rule salt
sand scene school screen screw sea season second section seed sense sentence series service sex ship shirt shoe
shoulder show side sign signal silver sister site size skill skin sky snow society son song sort sound source south
space spoon sport spring staff stage standard star state station step stock stomach stone store storm story strategy
street student study subject success sugar summer sun support system table tank tax teacher team term test theater
thing thought throat ticket time tissue tool tooth top town trade train training tree truck truth tube type use
valley value valve video view voice wall war water wave way week west wheel wife wind window winter wire woman wood
word work worker world year
"""

WORDS: tuple[str, ...] = tuple(_TEXT.split())
