/** What is known of the model, in words. */
import { inBytes, readable } from "./meters.js";

/** [label, value, short form] of every fact that `/v1/models` gives; the short forms greet a newcomer. */
function rows(facts) {
  const count = (value) => Number(value).toLocaleString("en");
  const known = [
    ["parameters", "Parameters", inMillions, (value) => `${inMillions(value)} parameters`],
    ["layers", "Layers", count, (value) => `${count(value)} layers`],
    ["executed_layers", "Layers run", count, null],
    ["context", "Context", (value) => `${count(value)} tokens`, (value) => `${count(value)} tokens of context`],
    ["quantisation", "Weights", String, String],
    ["file_bytes", "Size", inBytes, inBytes],
    ["threads", "Threads", count, null],
    ["license", "Licence", String, null],
    ["engine", "Engine", String, null],
  ];
  return known
    .filter(([name]) => facts[name] !== undefined && facts[name] !== null)
    .map(([name, label, long, short]) => [label, long(facts[name]), short?.(facts[name])]);
}

export function showModelCard(backend) {
  const known = rows(backend.facts);
  const pairs = [["Name", backend.name], ["Kind", backend.isChat ? "chat" : "base: continues text"], ...known];
  document.getElementById("card").replaceChildren(
    ...pairs.flatMap(([label, value]) => [withText("dt", label), withText("dd", value)]),
  );
  const short = known.map(([, , text]) => text).filter(Boolean);
  document.getElementById("facts").replaceChildren(...short.map((text) => withText("li", text)));
}

function inMillions(count) {
  return count >= 1e9 ? `${readable(count / 1e9)}B` : `${readable(count / 1e6)}M`;
}

function withText(name, text) {
  const element = document.createElement(name);
  element.textContent = text;
  return element;
}
