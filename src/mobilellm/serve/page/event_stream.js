/**
 * The JSON values of a stream of server-sent events, up to the event [DONE].
 *
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<any>} Leaving it early cancels the stream.
 */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      held += done ? "\n\n" : value;
      const whole = held.split(/\r?\n\r?\n/);
      held = whole.pop();
      for (const event of whole) {
        const data = dataOf(event);
        if (data === "[DONE]") return;
        if (data) yield JSON.parse(data);
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function dataOf(event) {
  const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
}
