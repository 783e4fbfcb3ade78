"""Sentence and question templates of the synthetic corpus.

{S} is the subject or its pronoun, {N} its name, and {A} the answer. Relations
of a kind share answer types, so that a passage holds several candidates of one.
"""

from typing import NamedTuple


class Relation(NamedTuple):
  """A relation between a subject of a passage and an answer."""

  answer: str  # 'place', 'person', 'year' or 'count'
  statements: tuple[str, ...]  # paraphrases, as are the questions
  questions: tuple[str, ...]


class Kind(NamedTuple):
  """A kind of subject, with its relations."""

  name: str  # {W} is one invented word
  pronouns: tuple[str, ...]
  relations: tuple[Relation, ...]


def _relation(answer: str, statements: str, questions: str) -> Relation:
  return Relation(answer, tuple(s.strip() + '.' for s in statements.split('|')),
                  tuple(q.strip() + '?' for q in questions.split('|')))


PERSON = Kind('{W} {W}', ('he', 'she'), (
    _relation('place', '{S} was born in {A} | {A} is where {S} was born',
              'Where was {N} born | In which town was {N} born | '
              'What is the birthplace of {N}'),
    _relation('place', '{S} died in {A} | {A} is where {S} died',
              'Where did {N} die | In which town did {N} die | '
              'What is the place of death of {N}'),
    _relation('place', '{S} studied in {A} | {S} went to school in {A}',
              'Where did {N} study | In which town was {N} a student | '
              'Where did {N} go to school'),
    _relation('place', '{S} settled in {A} | {S} made a home in {A}',
              'Where did {N} settle | In which town did {N} live | '
              'Where was the home of {N}'),
    _relation('person', '{S} married {A} | {A} became the spouse of {N}',
              'Who was married to {N} | Whom did {N} marry | '
              'Who was the spouse of {N}'),
    _relation('person', '{S} learned from {A} | {A} taught {N}',
              'Who taught {N} | From whom did {N} learn | '
              'Who was the teacher of {N}'),
    _relation('person', '{S} quarrelled with {A} | {A} was a rival of {N}',
              'Who was the rival of {N} | With whom did {N} quarrel'),
    _relation('year', '{S} was born in {A} | In {A} {S} was born',
              'When was {N} born | In which year was {N} born | '
              'What is the birth year of {N}'),
    _relation('year', '{S} died in {A} | In {A} {S} died',
              'When did {N} die | In which year did {N} die | '
              'What is the year of death of {N}'),
))

SHIP = Kind('the {W}', ('it', 'she'), (
    _relation('place', '{S} was built in {A} | {A} is where {S} was built',
              'Where was {N} built | In which town was {N} built | '
              'Which yard built {N}'),
    _relation('place', '{S} sank near {A} | {S} was wrecked off {A}',
              'Where did {N} sink | Near which town was {N} wrecked'),
    _relation('place', '{S} sailed from {A} | {A} was the home port of {N}',
              'Where did {N} sail from | What was the home port of {N}'),
    _relation('person', '{A} commanded {N} | {S} sailed under {A}',
              'Who commanded {N} | Who was the captain of {N}'),
    _relation('person', '{A} designed {N} | {S} was drawn by {A}',
              'Who designed {N} | Who drew the plans of {N}'),
    _relation('person', '{A} owned {N} | {S} belonged to {A}',
              'Who owned {N} | Whom did {N} belong to'),
    _relation('year', '{S} was launched in {A} | In {A} {S} was launched',
              'When was {N} launched | In which year was {N} launched'),
    _relation('year', '{S} was lost in {A} | In {A} {S} was lost',
              'When was {N} lost | In which year was {N} lost'),
    _relation('count', '{S} carried {A} sailors | {A} sailors served on {N}',
              'How many sailors did {N} carry | What was the crew of {N}'),
))

RIVER = Kind('the {W} river', ('it',), (
    _relation('place', '{S} rises near {A} | {A} lies at the source of {N}',
              'Where does {N} rise | Where is the source of {N}'),
    _relation('place', '{S} flows through {A} | {A} stands beside {N}',
              'Which town does {N} flow through | Which town is beside {N}'),
    _relation('place', '{S} ends at {A} | {A} lies at the mouth of {N}',
              'Where does {N} end | Where is the mouth of {N}'),
    _relation('person', '{A} mapped {N} | {S} was charted by {A}',
              'Who mapped {N} | Who drew the chart of {N}'),
    _relation('person', '{A} bridged {N} | {S} was bridged by {A}',
              'Who bridged {N} | Who built a bridge over {N}'),
    _relation('person', '{A} gave {N} its name | {S} was named after {A}',
              'Who gave {N} its name | After whom was {N} named'),
    _relation('year', '{S} flooded in {A} | In {A} {S} flooded',
              'When did {N} flood | In which year did {N} flood'),
    _relation('year', '{S} froze in {A} | In {A} {S} froze',
              'When did {N} freeze | In which year was {N} ice'),
    _relation('count', '{S} is {A} miles long | {S} runs for {A} miles',
              'How long is {N} | How many miles does {N} run'),
))

BOOK = Kind('the book {W}', ('it',), (
    _relation('person', '{A} wrote {N} | {S} was written by {A}',
              'Who wrote {N} | Who is the author of {N}'),
    _relation('person', '{A} printed {N} | {S} was printed by {A}',
              'Who printed {N} | Who was the printer of {N}'),
    _relation('person', '{A} translated {N} | {S} was translated by {A}',
              'Who translated {N} | Who was the translator of {N}'),
    _relation('place', '{S} was printed in {A} | {A} is where {S} was printed',
              'Where was {N} printed | In which town was {N} printed'),
    _relation('place', '{S} is set in {A} | {A} is the scene of {N}',
              'Where is {N} set | What is the scene of {N}'),
    _relation('place', '{S} was banned in {A} | {A} banned {N}',
              'Where was {N} banned | Which town banned {N}'),
    _relation('year', '{S} was finished in {A} | In {A} {S} was finished',
              'When was {N} finished | In which year was {N} finished'),
    _relation('year', '{S} was banned in {A} | In {A} {S} was banned',
              'When was {N} banned | In which year was {N} banned'),
    _relation('count', '{S} has {A} pages | {S} fills {A} pages',
              'How long is {N} | How many pages does {N} have'),
))

BATTLE = Kind('the battle of {W}', ('it',), (
    _relation('person', '{A} won {N} | {S} was won by {A}',
              'Who won {N} | Who was the winner of {N}'),
    _relation('person', '{A} lost {N} | {S} was lost by {A}',
              'Who lost {N} | Who was beaten in {N}'),
    _relation('person', '{A} fell in {N} | {S} cost the life of {A}',
              'Who fell in {N} | Who was killed in {N}'),
    _relation('place', '{S} was fought near {A} | {A} saw {N}',
              'Where was {N} fought | Near which town was {N}'),
    _relation('place', '{S} saved {A} | {A} was saved by {N}',
              'Which town did {N} save | What was saved by {N}'),
    _relation('place', '{S} ruined {A} | {A} was ruined by {N}',
              'Which town did {N} ruin | What was ruined by {N}'),
    _relation('year', '{S} was fought in {A} | In {A} {S} was fought',
              'When was {N} fought | In which year was {N}'),
    _relation('year', '{S} was avenged in {A} | In {A} {S} was avenged',
              'When was {N} avenged | In which year was {N} avenged'),
    _relation('count', '{S} took {A} lives | {A} soldiers died in {N}',
              'How many lives did {N} take | How many died in {N}'),
))

KINDS = {'person': PERSON, 'ship': SHIP, 'river': RIVER, 'book': BOOK,
         'battle': BATTLE}

ASIDES = {  # sentences that no question asks for
    'place': ('Few maps show {A}.', 'Travellers praise {A}.',
              'The road to {A} is steep.', 'Snow seldom falls on {A}.'),
    'person': ('Songs recall {A}.', 'A street bears the name of {A}.',
               'Little is known of {A}.', 'Some blamed {A}.'),
    'year': ('The winter of {A} was hard.', 'Grain was dear in {A}.',
             'The comet of {A} was bright.'),
    'count': ('The old tax was {A} coins.', 'A mule cost {A} coins.'),
}
