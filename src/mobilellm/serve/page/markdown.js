/**
 * A model's Markdown as elements: headings, paragraphs, lists, quotes, code, emphasis and links.
 *
 * Nothing of the text is ever parsed as HTML: each piece of it becomes a text node. Links lead to http and
 * https only; whatever is not understood is shown as it was written.
 */

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const ITEM = /^( {0,12})([-*+]|\d{1,9}[.)])[ \t]+(.*)$/;
const DEEPEST = 6;

/** Markdown in an element, drawn anew only from the first block that changed: an answer grows at its end. */
export class MarkdownView {
  #element;
  #sources = [];

  constructor(element) {
    this.#element = element;
  }

  show(text) {
    const blocks = blocksOf(text.split(/\r?\n/));
    let same = 0;
    while (same < blocks.length && blocks[same].source === this.#sources[same]) same += 1;
    while (this.#element.childNodes.length > same) this.#element.lastChild.remove();
    this.#element.append(...blocks.slice(same).map((block) => block.build()));
    this.#sources = blocks.map((block) => block.source);
  }
}

/** Top blocks of lines of text: what they were made of, and a way to build each. */
function blocksOf(lines, depth = 0) {
  const blocks = [];
  let start = 0;
  while (start < lines.length) {
    if (!lines[start].trim()) {
      start += 1;
      continue;
    }
    const [length, build] = blockAt(lines, start, depth);
    blocks.push({ source: lines.slice(start, start + length).join("\n"), build });
    start += length;
  }
  return blocks;
}

/** Number of lines of the block that begins at `start`, and a function that builds its element. */
function blockAt(lines, start, depth) {
  const first = lines[start];
  const fence = FENCE.exec(first);
  if (fence) return fencedAt(lines, start, fence);
  const heading = HEADING.exec(first);
  if (heading) {
    // An answer stands below the page's own headings.
    const level = Math.min(heading[1].length + 2, 6);
    return [1, () => withInline(`h${level}`, heading[2])];
  }
  if (isRule(first)) return [1, () => element("hr")];
  if (depth < DEEPEST && first.startsWith(">")) return quoteAt(lines, start, depth);
  if (depth < DEEPEST && ITEM.test(first)) return listAt(lines, start, depth);
  let end = start + 1;
  while (end < lines.length && lines[end].trim() && !beginsBlock(lines[end], depth)) end += 1;
  const text = lines.slice(start, end).join("\n");
  return [end - start, () => withInline("p", text)];
}

function beginsBlock(line, depth) {
  if (FENCE.test(line) || HEADING.test(line) || isRule(line)) return true;
  return depth < DEEPEST && (line.startsWith(">") || ITEM.test(line));
}

function isRule(line) {
  return /^(-{3,}|\*{3,}|_{3,})$/.test(line.replace(/[ \t]/g, ""));
}

function fencedAt(lines, start, [, mark, language]) {
  const closes = (line) => line.trim().length >= mark.length && !line.trim().replaceAll(mark[0], "");
  let end = start + 1;
  while (end < lines.length && !closes(lines[end])) end += 1;
  const code = lines.slice(start + 1, end).join("\n");
  return [Math.min(end + 1, lines.length) - start, () => fenced(code, language)];
}

function fenced(code, language) {
  const copy = element("button", "Copy");
  copy.type = "button";
  copy.className = "copy-code";
  copy.dataset.copies = "code";
  copy.setAttribute("aria-label", "Copy this code");
  const head = element("div", element("span", language || "code"), copy);
  head.className = "code-head";
  const body = element("pre", element("code", code));
  body.tabIndex = 0; // long lines scroll, by keyboard too
  const block = element("div", head, body);
  block.className = "code";
  return block;
}

function quoteAt(lines, start, depth) {
  let end = start;
  while (end < lines.length && lines[end].startsWith(">")) end += 1;
  const inside = lines.slice(start, end).map((line) => line.replace(/^> ?/, ""));
  return [end - start, () => element("blockquote", ...built(inside, depth))];
}

/** A list, and in it whatever is indented below its items. */
function listAt(lines, start, depth) {
  const [, indent, mark] = ITEM.exec(lines[start]);
  const isOrdered = /\d/.test(mark);
  const isInside = (line) => indentation(line) >= indent.length + 2;
  const isNext = (item) => item && item[1].length >= indent.length && /\d/.test(item[2]) === isOrdered;
  const items = [];
  let end = start;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    const item = ITEM.exec(line);
    if (!line.trim()) {
      const next = lines[end + 1] ?? "";
      if (!next.trim() || !(isInside(next) || isNext(ITEM.exec(next)))) break;
      items.at(-1).push("");
    } else if (items.length > 0 && isInside(line)) {
      items.at(-1).push(line.slice(Math.min(indentation(line), indent.length + mark.length + 1)));
    } else if (isNext(item) && !isRule(line)) {
      items.push([item[3]]);
    } else if (beginsBlock(line, depth) || !lines[end - 1].trim()) {
      break;
    } else {
      items.at(-1).push(line); // a paragraph goes on, without being indented
    }
  }
  return [end - start, () => list(items, isOrdered ? parseInt(mark, 10) : null, depth)];
}

function indentation(line) {
  return line.length - line.trimStart().length;
}

function list(items, first, depth) {
  const node = element(first === null ? "ul" : "ol", ...items.map((item) => listItem(item, depth)));
  if (first !== null && first !== 1) node.start = first;
  return node;
}

function listItem(lines, depth) {
  const children = built(lines, depth);
  // The text of an item of one paragraph stands in the item itself.
  if (children[0]?.localName === "p") children.splice(0, 1, ...children[0].childNodes);
  return element("li", ...children);
}

function built(lines, depth) {
  return blocksOf(lines, depth + 1).map((block) => block.build());
}

function withInline(name, text) {
  return element(name, ...inline(text, 0));
}

/** The nodes of a run of text: emphasis, code, links, and text. */
function inline(text, depth) {
  const nodes = [];
  const missing = new Set(); // marks that nothing closes any more: looked for once, so time stays linear
  let plain = "";
  let place = 0;
  while (place < text.length) {
    const found = depth < DEEPEST ? spanAt(text, place, depth, missing) : null;
    if (found) {
      if (plain) nodes.push(plain);
      plain = "";
      nodes.push(found.node);
      place = found.end;
    } else if (text[place] === "\\" && /[!-/:-@[-`{-~]/.test(text[place + 1] ?? "")) {
      plain += text[place + 1];
      place += 2;
    } else {
      // A run of one mark that opens nothing is text as a whole: "***" must not be tried three times.
      const run = /[*_`]/.test(text[place]) ? runLength(text, place) : 1;
      plain += text.slice(place, place + run);
      place += run;
    }
  }
  if (plain) nodes.push(plain);
  return nodes;
}

function spanAt(text, place, depth, missing) {
  const character = text[place];
  if (character === "`") return codeAt(text, place, missing);
  if (character === "*" || character === "_" || character === "~") return emphasisAt(text, place, depth, missing);
  if (character === "[" && text[place - 1] !== "!") return linkAt(text, place);
  if (character === "h" && !/\w/.test(text[place - 1] ?? "")) return bareLinkAt(text, place);
  return null;
}

function codeAt(text, place, missing) {
  const mark = "`".repeat(runLength(text, place));
  if (missing.has(mark)) return null;
  let close = text.indexOf(mark, place + mark.length);
  while (close >= 0 && runLength(text, close) !== mark.length) {
    close = text.indexOf(mark, close + runLength(text, close));
  }
  if (close < 0) {
    missing.add(mark);
    return null;
  }
  const code = text.slice(place + mark.length, close).replace(/\n/g, " ");
  const shown = /^ .*[^ ].* $/.test(code) ? code.slice(1, -1) : code;
  return { node: element("code", shown), end: close + mark.length };
}

function emphasisAt(text, place, depth, missing) {
  const character = text[place];
  const length = Math.min(runLength(text, place), 2);
  const mark = character.repeat(length);
  if (missing.has(mark) || mark === "~" || /\s/.test(text[place + length] ?? " ")) return null;
  // Within a word an underscore is part of a name.
  const joins = (at) => character === "_" && /[\p{L}\p{N}]/u.test(text[at] ?? "");
  if (joins(place - 1)) return null;
  let close = text.indexOf(mark, place + length + 1);
  for (let run; close >= 0; close = text.indexOf(mark, close + run)) {
    run = runLength(text, close);
    if ((run === length || run === 3) && !/\s/.test(text[close - 1]) && !joins(close + run)) {
      close += run - length; // of "***" the last ones: what they close began first
      const name = character === "~" ? "del" : length === 2 ? "strong" : "em";
      const node = element(name, ...inline(text.slice(place + length, close), depth + 1));
      return { node, end: close + length };
    }
  }
  missing.add(mark);
  return null;
}

function linkAt(text, place) {
  const close = text.slice(place, place + 500).indexOf("](");
  if (close < 0) return null;
  const label = text.slice(place + 1, place + close);
  const rest = text.slice(place + close + 2, place + close + 2002);
  const end = rest.search(/[)\s]/);
  if (end < 0 || rest[end] !== ")" || label.includes("\n\n")) return null;
  const node = link(rest.slice(0, end), [label]);
  return node && { node, end: place + close + 2 + end + 1 };
}

function bareLinkAt(text, place) {
  const pattern = /https?:\/\/[^\s<>"'`\])*]{1,2000}/y;
  pattern.lastIndex = place;
  const address = pattern.exec(text)?.[0].replace(/[.,;:!?]+$/, "");
  const node = address && link(address, [address]);
  return node ? { node, end: place + address.length } : null;
}

/** A link to another site, or null for any address but http and https. */
function link(address, children) {
  if (!/^https?:\/\//i.test(address) || !URL.canParse(address)) return null;
  const node = element("a", ...children);
  node.href = address;
  node.title = node.href; // where it leads, whatever its text says
  node.rel = "noopener noreferrer";
  node.target = "_blank";
  return node;
}

function runLength(text, place) {
  let end = place + 1;
  while (text[end] === text[place]) end += 1;
  return end - place;
}

function element(name, ...children) {
  const made = document.createElement(name);
  made.append(...children);
  return made;
}
