"""Reads tokenizers from the files of transformers.

A tokenizer is in tokenizer.json, or else in the vocab.txt of BERT or in the
vocab.json and merges.txt of RoBERTa; other files beside them have settings and
added tokens.
"""

import json
import pathlib
import re
import reprlib
import shlex
from typing import Any

import tokenizers

from qa_jax import errors
from qa_jax.data.examples import check_text
from qa_jax.data.tokenizer import NORMALIZER
from qa_jax.data.tokenizer import ROLES
from qa_jax.data.tokenizer import SPECIAL
from qa_jax.data.tokenizer import Tokenizer
from qa_jax.data.tokenizer import bert_pipeline
from qa_jax.data.tokenizer import byte_level
from qa_jax.data.tokenizer import is_wordpiece
from qa_jax.data.tokenizer import shown
from qa_jax.io import files

# Names in RoBERTa's vocabulary, and in those of XLM-R and CamemBERT.
ROBERTA_SPECIAL = ('<pad>', '<unk>', '<s>', '</s>', '<mask>')
# Values of other settings that BERT's tokenizer has; there is no code for
# further values.
SUPPORTED = {'do_basic_tokenize': (None, True), 'clean_text': (None, True),
             'word_tokenizer_type': (None, 'basic'),
             'subword_tokenizer_type': (None, 'wordpiece')}
# Classes whose vocab.txt is read like that of BertTokenizer.
CLASSES = (None, *(f'{name}Tokenizer{fast}' for fast in ('', 'Fast')
                   for name in ('Bert', 'DistilBert', 'Electra')))
# Classes whose vocab.json and merges.txt are read like those of
# RobertaTokenizer.
BPE_CLASSES = (None, 'RobertaTokenizer', 'RobertaTokenizerFast')
# Classes that read tokenizer.json alone, without the settings of NORMALIZER.
GENERIC = ('PreTrainedTokenizerFast', 'TokenizersBackend')
UNLIMITED = 10**9  # transformers writes 10**30 if the length has no limit


def read_tokenizer(directory: str | pathlib.Path,
                   lowercase: bool | None = None) -> Tokenizer:
  """Reads the tokenizer of a directory from the files of transformers.

  It is in tokenizer.json, or else in the vocab.txt of BERT or in the vocab.json
  and merges.txt of RoBERTa.

  tokenizer_config.json, special_tokens_map.json and added_tokens.json are read
  if they are present, with the precedence of BertTokenizerFast of transformers
  4.57. Truncation and padding do not concern windows and are left out.
  `lowercase=None` takes the setting of the directory.

  Raises:
    UserError: the vocabulary is missing or malformed, a setting is not
      supported or contradicts another one, or the case of the vocabulary
      differs from `lowercase`, which would silently cost 6.5 F1
      (transformers#4549).
  """
  directory = pathlib.Path(directory)
  about, names, numbered = (
      files.read_object(directory / name) if (directory / name).is_file()
      else {} for name in ('tokenizer_config.json', 'special_tokens_map.json',
                           'added_tokens.json'))
  where = directory / 'tokenizer_config.json'
  _check_settings(about, where)
  library = None
  if (directory / 'tokenizer.json').is_file():
    library = _read_library(directory / 'tokenizer.json')
    _check_vocabulary(library, directory)
  special = _special_tokens(about, names, library, directory)
  if library is None and (directory / 'vocab.json').is_file():
    library = _read_roberta(directory, about, special)
  if library:
    stored = folds = _set_normalizer(
        library, about, where,
        generic=about.get('tokenizer_class') in GENERIC)
  else:
    library, stored = _read_bert(directory, about, special, lowercase)
    folds = _set_normalizer(library, about, where)
  if None not in (stored, lowercase) and stored != lowercase:
    raise errors.UserError(
        f'data.lowercase={lowercase}, but the vocabulary in {directory} is '
        f'{"lower-cased" if stored else "cased"}; set data.lowercase={stored}')
  _check_model(library, about | {'unk_token': special[1]}, where)
  _set_prefix_space(library, about, where)
  _add_tokens(library, about, names, numbered, special, directory)
  limit = about.get('model_max_length', about.get('max_len'))
  tokenizer = Tokenizer(
      _vocabulary(library, directory), folds,
      _definition(library, folds, special), special,
      None if limit is None or limit > UNLIMITED else int(limit),
      *_read_layout(library, special, directory))
  _check_closed(tokenizer, directory)
  return tokenizer


def _check_settings(about: dict[str, Any], where: pathlib.Path) -> None:
  """Raises a UserError if tokenizer_config.json asks for missing features."""
  for name in NORMALIZER:
    errors.require(
        type(about.get(name)) in (type(None), bool),
        f'{where}: {name} is {about.get(name)!r}, expected true or false')
  for name, values in SUPPORTED.items():
    errors.require(
        about.get(name) in values,
        f'{where}: {name}={reprlib.repr(about.get(name))} is not supported; '
        f'only {values[1]!r} is')
  for name in ('model_max_length', 'max_len'):
    limit = about.get(name, 1)
    errors.require(
        limit is None or (type(limit) in (int, float) and limit >= 1),
        f'{where}: {name} is {limit!r}, expected a positive number of tokens')
  for name, kind in (('never_split', list), ('added_tokens_decoder', dict)):
    errors.require(
        about.get(name) is None or isinstance(about[name], kind),
        f'{where}: {name} is {reprlib.repr(about.get(name))}, expected a '
        f'{kind.__name__}')


def _read_library(path: pathlib.Path) -> tokenizers.Tokenizer:
  """Reads tokenizer.json, without its truncation."""
  whole = files.read_object(path)
  _check_json_vocabulary(whole, path)
  try:
    library = tokenizers.Tokenizer.from_str(json.dumps(whole))
  except Exception as e:  # the library raises no narrower class
    raise errors.UserError(
        f'{path}: the library tokenizers cannot read it '
        f'({" ".join(str(e).split())}); save the tokenizer again') from None
  for token in whole.get('added_tokens') or ():
    _check_id(library, token['content'], token['id'], path)
  library.no_truncation()
  return library


def _check_json_vocabulary(whole: dict[str, Any], path: pathlib.Path) -> None:
  """Raises a UserError unless tokenizer.json has a supported vocabulary."""
  model = whole.get('model')
  kind = model.get('type', 'WordPiece') if isinstance(model, dict) else model
  supported = 'WordPiece, byte-level BPE and Unigram vocabularies are'
  vocab = model.get('vocab') if isinstance(model, dict) else None
  errors.require(
      kind in ('WordPiece', 'BPE', 'Unigram') and isinstance(
          vocab, list if kind == 'Unigram' else dict),
      f'{path}: model {reprlib.repr(kind)} is not supported; {supported}')
  if kind == 'Unigram':
    errors.require(
        all(isinstance(row, list) and len(row) == 2 and type(row[0]) is str
            for row in vocab) and len({row[0] for row in vocab}) == len(vocab),
        f'{path}: its vocabulary is not a list of distinct pieces with scores')
    check_text('\n'.join(row[0] for row in vocab), f'{path}: vocabulary')
    errors.require(
        type(model.get('unk_id')) is int,
        f'{path}: unk_id is {model.get("unk_id")!r}, expected the number of '
        'the unknown token')
    return
  if kind == 'BPE':
    errors.require(
        byte_level(whole) is not None,
        f'{path}: model BPE without the pre-tokenizer ByteLevel is not '
        f'supported; {supported}')
    errors.require(
        not model.get('dropout'),
        f'{path}: BPE dropout {model.get("dropout")!r} makes tokens random; '
        'set it to null')
  if not all(type(i) is int for i in vocab.values()) or (
      sorted(vocab.values()) != list(range(len(vocab)))):
    raise errors.UserError(
        f'{path}: its {len(vocab)} tokens are not numbered '
        f'0 … {len(vocab) - 1}')
  check_text('\n'.join(vocab), f'{path}: vocabulary')
  unknown = model.get('unk_token', '[UNK]')
  errors.require(
      kind != 'WordPiece' or type(unknown) is not str or unknown in vocab,
      f'{path}: its unk_token {unknown!r} is not in its vocabulary')


def _read_roberta(directory: pathlib.Path, about: dict[str, Any],
                  special: tuple[str, ...]) -> tokenizers.Tokenizer:
  """Reads the tokenizer of vocab.json and merges.txt, as RobertaTokenizerFast.

  Radford et al. (2019) describe its bytes and its pre-tokenizer.
  """
  path, kind = directory / 'vocab.json', about.get('tokenizer_class')
  errors.require(
      kind in BPE_CLASSES,
      f'{directory / "tokenizer_config.json"}: tokenizer_class {kind!r} is not '
      'supported without a tokenizer.json; save the fast tokenizer there')
  vocab, merges = files.read_object(path), directory / 'merges.txt'
  errors.require(merges.is_file(), f'{merges} is missing; fetch it again')
  _check_json_vocabulary(
      {'model': {'type': 'BPE', 'vocab': vocab},
       'pre_tokenizer': {'type': 'ByteLevel'}}, path)
  pairs = []
  for number, line in enumerate(files.read_text(merges).split('\n'), 1):
    if line and not (number == 1 and line.startswith('#version')):
      pair = tuple(line.split(' '))
      errors.require(
          len(pair) == 2 and {*pair, ''.join(pair)} <= vocab.keys(),
          f'{merges}: line {number} {reprlib.repr(line)} is not a pair of '
          'tokens of vocab.json whose union is one, too')
      pairs.append(pair)
  library = tokenizers.Tokenizer(tokenizers.models.BPE(
      vocab, pairs, continuing_subword_prefix='', end_of_word_suffix=''))
  library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False)
  library.decoder = tokenizers.decoders.ByteLevel()
  missing = [t for t in special[2:4] if t not in vocab]
  errors.require(not missing, f'{path}: it lacks '
                 f'{", ".join(map(shown, missing))}, the first or separator '
                 'token of RoBERTa; tokenizer_config.json may name another')
  library.post_processor = tokenizers.processors.RobertaProcessing(
      (special[3], vocab[special[3]]), (special[2], vocab[special[2]]),
      add_prefix_space=False)
  return library


def _read_bert(directory: pathlib.Path, about: dict[str, Any],
               special: tuple[str, ...], lowercase: bool | None,
               ) -> tuple[tokenizers.Tokenizer, bool | None]:
  """Reads the tokenizer of a vocab.txt.

  Also returns whether the directory has it lower-cased, None if unknown; then
  `lowercase` decides, True by default.
  """
  path, kind = directory / 'vocab.txt', about.get('tokenizer_class')
  if not path.is_file():
    slow = sorted(f.name for f in directory.glob('*.model'))
    raise errors.UserError(
        f'{directory}: no vocabulary; expected tokenizer.json, vocab.txt, or '
        'vocab.json with merges.txt' + (
            f'; {slow[0]} is not read: save the fast tokenizer there where '
            'transformers is installed: python -c "import sys, transformers; d '
            '= sys.argv[1]; transformers.AutoTokenizer.from_pretrained(d)'
            f'.save_pretrained(d)" {shlex.quote(str(directory))}'
            if slow else '; of a hub id with a SentencePiece model alone, save '
            'the fast tokenizer of transformers to a directory'))
  errors.require(
      kind in CLASSES,
      f'{directory / "tokenizer_config.json"}: tokenizer_class {kind!r} is not '
      'supported without a tokenizer.json; save the fast tokenizer there')
  vocab, stored = _read_vocabulary(path), about.get('do_lower_case')
  if stored is None and any(
      re.search('[A-Z]', t) for t in vocab
      if not t.startswith('[') and t not in special):
    stored = False  # only a cased vocabulary has capitals
  chosen = next(x for x in (stored, lowercase, True) if x is not None)
  return bert_pipeline(vocab, chosen, special[1]), stored


def _read_vocabulary(path: pathlib.Path) -> dict[str, int]:
  """Reads {token: id} from vocab.txt.

  Of equal lines the last one counts, as in transformers. The earlier lines get
  names with a space, which no piece of a word has.
  """
  lines = files.read_text(path).rstrip('\n').split('\n')
  last = {token: i for i, token in enumerate(lines)}
  return {token if last[token] == i else f'duplicate of {token} {i}': i
          for i, token in enumerate(lines)}


def _check_vocabulary(library: tokenizers.Tokenizer,
                      directory: pathlib.Path) -> None:
  """Raises a UserError if vocab.txt or .json contradicts tokenizer.json."""
  for name, read in (('vocab.txt', _read_vocabulary),
                     ('vocab.json', files.read_object)):
    if not (directory / name).is_file():
      continue
    lines, ids = read(directory / name), library.get_vocab()
    pieces = library.get_vocab(with_added_tokens=False)
    wrong = [t for t in {**lines, **pieces} if lines.get(t) != ids.get(t)]
    errors.require(
        not wrong, f'{directory}: {name} and tokenizer.json give '
        f'{len(wrong)} tokens another id, first {reprlib.repr(wrong[:1])}; '
        'remove the file that is not of this checkpoint')


def _special_tokens(about: dict[str, Any], names: dict[str, Any],
                    library: tokenizers.Tokenizer | None,
                    directory: pathlib.Path) -> tuple[str, ...]:
  """Returns the special tokens in the order of ROLES.

  A token that the files do not name is the one that tokenizer.json uses, or
  else that of BERT or, in other vocabularies than WordPiece, of RoBERTa. The
  padding of `library` is turned off.
  """
  used, defaults = {}, SPECIAL
  if library is None and (directory / 'vocab.json').is_file():
    defaults = ROBERTA_SPECIAL
  if library:
    if not isinstance(library.model, tokenizers.models.WordPiece):
      defaults = ROBERTA_SPECIAL
    used['unk_token'] = _unknown_token(library)
    used['pad_token'] = (library.padding or {}).get('pad_token')
    library.no_padding()  # else the pair below may end in padding tokens
    for index in (0, 4):  # MPNet and ALBERT have names of both families
      present = [family[index] for family in (SPECIAL, ROBERTA_SPECIAL)
                 if library.token_to_id(family[index]) is not None]
      if len(present) == 1:
        used[ROLES[index]] = used.get(ROLES[index]) or present[0]
    if library.post_processor:
      pair = library.encode('', '').tokens
      used |= {'cls_token': pair[0], 'sep_token': pair[-1]} if pair else {}
  special = []
  for role, default in zip(ROLES, defaults, strict=True):
    stored = []
    for source, name in ((about, 'tokenizer_config.json'),
                         (names, 'special_tokens_map.json')):
      token = source.get(role)
      if isinstance(token, dict):
        token = token.get('content')
      if source.get(role) is not None:
        stored.append(check_text(token, f'{directory / name}: {role}'))
    errors.require(
        len(set(stored)) < 2,
        f'{directory}: {role} is {" and ".join(map(shown, stored))} in '
        'tokenizer_config.json and special_tokens_map.json; correct one')
    special.append(stored[0] if stored else used.get(role) or default)
  return tuple(special)


def _unknown_token(library: tokenizers.Tokenizer) -> str | None:
  """Returns the token that the model gives for unknown text, if it names one.

  Byte-level BPE knows every text.
  """
  model = json.loads(library.to_str())['model']
  if model['type'] == 'Unigram':
    number = model.get('unk_id')
    return None if number is None else model['vocab'][number][0]
  return model.get('unk_token')


def _set_normalizer(library: tokenizers.Tokenizer, about: dict[str, Any],
                    where: pathlib.Path, *, generic: bool = False) -> bool:
  """Gives the settings to a BertNormalizer; returns whether case is folded.

  Raises:
    UserError: another normaliser, or that of a `generic` class, contradicts a
      setting.
  """
  fold = (library.normalizer.normalize_str if library.normalizer
          else lambda text: text)
  settings = {name: about[name] for name in NORMALIZER
              if about.get(name) is not None}
  state = (json.loads(library.normalizer.__getstate__())
           if library.normalizer else {})
  folds = {'do_lower_case': 'a' in fold('A'),
           'strip_accents': 'e' in fold('\u00e9')}
  if state.pop('type', None) == 'BertNormalizer':
    if not generic:
      state |= {NORMALIZER[name]: value for name, value in settings.items()}
      library.normalizer = tokenizers.normalizers.BertNormalizer(**state)
      return state['lowercase']
    folds['tokenize_chinese_chars'] = state['handle_chinese_chars']
  for name, value in folds.items():
    errors.require(
        settings.get(name) in (None, value),
        f'{where}: {name}={settings.get(name)}, but the normalizer of '
        f'tokenizer.json has {value}; correct one of the files')
  return folds['do_lower_case']


def _check_model(library: tokenizers.Tokenizer, about: dict[str, Any],
                 where: pathlib.Path) -> None:
  """Raises a UserError if a setting of WordPiece contradicts the vocabulary."""
  model = library.model
  if not isinstance(model, tokenizers.models.WordPiece):
    unknown = _unknown_token(library)
    errors.require(
        unknown in (None, about['unk_token']),
        f'{where}: unk_token={reprlib.repr(about["unk_token"])}, but the '
        f'tokenizer has {unknown!r}; correct one of the files')
    return
  for name, value in (
      ('unk_token', model.unk_token),
      ('wordpieces_prefix', model.continuing_subword_prefix),
      ('max_input_chars_per_word', model.max_input_chars_per_word)):
    errors.require(
        about.get(name) in (None, value),
        f'{where}: {name}={reprlib.repr(about.get(name))}, but the tokenizer '
        f'has {value!r}; write the value into tokenizer.json')


def _set_prefix_space(library: tokenizers.Tokenizer, about: dict[str, Any],
                      where: pathlib.Path) -> None:
  """Gives add_prefix_space to the pre-tokenizer, as transformers does.

  Raises:
    UserError: the pre-tokenizer has no such setting.
  """
  value = about.get('add_prefix_space')
  if value is None or isinstance(library.model, tokenizers.models.WordPiece):
    return
  state = (json.loads(library.pre_tokenizer.__getstate__())
           if library.pre_tokenizer else {'type': None})
  if state['type'] == 'ByteLevel' and type(value) is bool:
    state.pop('type')
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        **state | {'add_prefix_space': value})
    return
  level = byte_level({'pre_tokenizer': state})
  stored = level['add_prefix_space'] if level else True  # that of Metaspace
  errors.require(
      value is stored, f'{where}: add_prefix_space={reprlib.repr(value)} is '
      f'not supported; the pre-tokenizer of tokenizer.json has {stored}')


def _add_tokens(library: tokenizers.Tokenizer, about: dict[str, Any],
                names: dict[str, Any], numbered: dict[str, Any],
                special: tuple[str, ...], directory: pathlib.Path) -> None:
  """Adds the tokens that files beside tokenizer.json name, as transformers."""
  extra, path = {}, directory / 'tokenizer_config.json'
  decoder = about.get('added_tokens_decoder')
  for source in (about, {} if decoder is not None else names):
    for token in _extra_tokens(source, path):
      extra[token.content] = token
  present = library.get_added_tokens_decoder()
  rows = [*(decoder or {}).items()]
  if decoder is None:
    path = directory / 'added_tokens.json'
    rows = [(i, {'content': token, 'special': token in {*extra, *special}})
            for token, i in numbered.items()]
  added = {}
  for i, fields in rows:
    errors.require(
        type(i) is int or (type(i) is str and re.fullmatch('[0-9]{1,9}', i)),
        f'{path}: the id of {reprlib.repr(fields)} is {reprlib.repr(i)}, '
        'expected a whole number')
    if decoder is not None or i not in present:
      added[int(i)] = _added_token(fields, path)
  new = [token for i, token in sorted(added.items())
         if repr(present.get(i)) != repr(token)
         and not (token.content in special
                  and library.token_to_id(token.content) == i)]
  known = {token.content for token in (*present.values(), *new)}
  library.add_tokens(new + [t for name, t in extra.items()
                            if name not in known])
  for i, token in added.items():
    _check_id(library, token.content, i, path)
  split = about.get('never_split') or []
  errors.require(
      set(map(str, split)) <= {*special, *extra},
      f'{directory / "tokenizer_config.json"}: never_split='
      f'{reprlib.repr(split)} is not supported; add its words as tokens')


def _extra_tokens(source: dict[str, Any], path: pathlib.Path
                  ) -> list[tokenizers.AddedToken]:
  """Returns the special tokens without a role, by their names in both APIs.

  `extra_special_tokens` is a list in transformers 5 and a dict in 4.57.
  """
  out = []
  for name in ('additional_special_tokens', 'extra_special_tokens'):
    tokens = source.get(name) or []
    errors.require(isinstance(tokens, (list, dict)),
                   f'{path}: {name} is {reprlib.repr(tokens)}, expected a list')
    out += [_added_token(t if isinstance(t, dict) else {'content': t}, path,
                         special=True)
            for t in (tokens.values() if isinstance(tokens, dict) else tokens)]
  return out


def _added_token(fields: Any, path: pathlib.Path,
                 **more: bool) -> tokenizers.AddedToken:
  try:
    fields = {k: v for k, v in fields.items() if k != '__type'} | more
    fields['content'] = check_text(fields['content'], 'content')
    # The library's default is no constant: special tokens are not normalised.
    fields.setdefault('normalized', not fields.get('special', False))
    return tokenizers.AddedToken(**fields)
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    raise errors.UserError(
        f'{path}: {reprlib.repr(fields)} is not an added token ({e})'
    ) from None


def _check_id(library: tokenizers.Tokenizer, token: str, i: int,
              path: pathlib.Path) -> None:
  errors.require(
      library.token_to_id(token) == i,
      f'{path}: the token {token!r} has the id {i}, but follows from the '
      f'vocabulary as {library.token_to_id(token)}; number added tokens '
      'without a gap behind the vocabulary')


def _read_layout(library: tokenizers.Tokenizer, special: tuple[str, ...],
                 directory: pathlib.Path) -> tuple[int, int]:
  """Returns (separators, context_type) of a Tokenizer.

  Raises:
    UserError: the rows of tokenizer.json are laid out otherwise.
  """
  path = directory / 'tokenizer.json'
  if library.post_processor is None:
    errors.require(
        isinstance(library.model, tokenizers.models.WordPiece),
        f'{path}: it has no post_processor, which says where its special '
        'tokens stand; save the fast tokenizer again')
    return 1, 1
  pair = library.encode('a', 'b')
  a, b = (library.encode(x, add_special_tokens=False).tokens for x in 'ab')
  _, _, first, separator, _ = special
  for count, kind in ((1, 1), (2, 0), (1, 0), (2, 1)):
    if (pair.tokens == [first, *a, *[separator] * count, *b, separator]
        and pair.type_ids == [0] * (len(a) + count + 1)
        + [kind] * (len(b) + 1)):
      return count, kind
  raise errors.UserError(
      f'{path}: its post_processor makes '
      f'{" ".join(map(shown, pair.tokens))} with token types {pair.type_ids} '
      f'of the pair (a, b); only {shown(first)} A {shown(separator)} B '
      f'{shown(separator)} with token types 0 and 1, or with two '
      f'{shown(separator)} between A and B, or with type 0 alone, is '
      'supported')


def _check_closed(tokenizer: Tokenizer, directory: pathlib.Path) -> None:
  """Raises a UserError if a special token that is typed in a text is matched.

  WordPiece tokenizers have this by their pre-tokenizers.
  """
  if tokenizer.is_wordpiece:
    return
  roles = {tokenizer.index[t] for t in tokenizer.special[2:]
           if t in tokenizer.index} | {tokenizer.pad_id}
  text = ' '.join(f'{t} a{t}a' for t in tokenizer.special)
  matched = roles.intersection(tokenizer.encode([text]).ids.tolist())
  errors.require(
      not matched, f'{directory / "tokenizer.json"}: it matches '
      f'{", ".join(shown(tokenizer.vocab[i]) for i in sorted(matched))} in '
      'the text of a question or context, where it would become a special '
      'token; such a vocabulary is not supported')


def _vocabulary(library: tokenizers.Tokenizer,
                directory: pathlib.Path) -> tuple[str, ...]:
  ids = library.get_vocab()
  errors.require(
      sorted(ids.values()) == list(range(len(ids))),
      f'{directory}: its {len(ids)} tokens, added ones included, are not '
      f'numbered 0 … {len(ids) - 1}')
  return tuple(sorted(ids, key=ids.get))


def _definition(library: tokenizers.Tokenizer, lowercase: bool,
                special: tuple[str, ...]) -> str:
  """Returns the definition of a tokenizer, '' if it is BERT's.

  Special tokens in the vocabulary are left out: they are not matched in texts.
  """
  whole = json.loads(library.to_str())
  pieces = whole['model']['vocab']
  if whole['model']['type'] == 'Unigram':
    pieces = {piece for piece, _ in pieces}
  whole |= dict.fromkeys(('truncation', 'padding', 'post_processor'))
  whole['added_tokens'] = [
      token for token in whole['added_tokens']
      if token['content'] not in special or token['content'] not in pieces]
  if is_wordpiece(whole):
    standard = json.loads(bert_pipeline(pieces, lowercase, special[1]).to_str())
    if whole | {'decoder': standard['decoder']} == standard:
      return ''
  return json.dumps(whole, ensure_ascii=False)
