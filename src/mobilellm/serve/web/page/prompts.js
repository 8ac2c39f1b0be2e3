/**
 * What is asked as token ids, as `mobilellm/chat_template.py` gives them: nobody can type a special token.
 *
 * While the template is rendered, <unk>, <s> and </s> are single private characters that no message holds;
 * afterwards these become the ids, and the text between them is encoded piece by piece.
 */
const SPECIAL_PIECES = ["<unk>", "<s>", "</s>"]; // their ids are their places
const FIRST_PRIVATE = 0xe000;
const LAST_PRIVATE = 0xf8ff;

export class Prompts {
  #tokenizer;
  #bos;
  #template;

  /** `tokenizer` knows no special tokens; `template` is Jinja, or null for a base model. */
  constructor(tokenizer, { bos_token_id: bos }, template) {
    this.#tokenizer = tokenizer;
    this.#bos = bos;
    this.#template = template;
  }

  ofText(text) {
    return [this.#bos, ...this.#encode(text)];
  }

  /** Ids up to where the assistant speaks. Throws an Error for what the template refuses. */
  ofMessages(messages) {
    const specials = unusedCharacters([this.#template, ...messages.map(({ content }) => content)].join());
    let template = this.#template;
    SPECIAL_PIECES.forEach((piece, id) => (template = template.replaceAll(piece, specials[id])));
    const [unk, bos, eos] = specials;
    const text = this.#tokenizer.apply_chat_template(messages, {
      chat_template: template,
      add_generation_prompt: true,
      tokenize: false,
      bos_token: bos,
      eos_token: eos,
      unk_token: unk,
      pad_token: unk,
    });
    const pieces = text.split(new RegExp(`([${specials.join("")}])`)).filter((piece) => piece !== "");
    return pieces.flatMap((piece) => (specials.includes(piece) ? [specials.indexOf(piece)] : this.#encode(piece)));
  }

  #encode(text) {
    return text === "" ? [] : this.#tokenizer.encode(text, { add_special_tokens: false });
  }
}

function unusedCharacters(text) {
  const free = [];
  for (let code = FIRST_PRIVATE; code <= LAST_PRIVATE && free.length < SPECIAL_PIECES.length; code += 1) {
    const character = String.fromCharCode(code);
    if (!text.includes(character)) free.push(character);
  }
  return free;
}
