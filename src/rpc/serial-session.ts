/**
 * Connections on a byte stream that has none (a virtio-serial port): what one side wrote before the other came, or left
 * behind when it went, must not be taken for the beginning of a new conversation.
 *
 *   host -> guest   `kiln-session TOKEN LF`, again and again until it is answered: the guest may come at any moment, and
 *                   what is written before that may be lost, or not
 *   guest -> host   the same line, once for each new token; what comes before it belongs to nobody
 *
 * Then both speak HTTP/2, the host first, whose preface ("PRI * …") cannot be mistaken for another such line.
 */
import { randomBytes } from 'node:crypto';
import type { Duplex } from 'node:stream';

const word = 'kiln-session ';
const tokenBytes = 16;
const lineLength = word.length + 2 * tokenBytes + 1;
const linePattern = new RegExp(`^${word}[0-9a-f]{${2 * tokenBytes}}\n$`);

/** How often the host says its line to a guest that may not be there yet, in ms. */
const sayMs = 100;

/**
 * The host's side. Resolves when the guest has answered: from there on the stream is a connection of its own.
 *
 * @param everyMs how often the host says its line
 */
export async function openSerialSession(stream: Duplex, everyMs = sayMs): Promise<void> {
  const line = Buffer.from(`${word}${randomBytes(tokenBytes).toString('hex')}\n`);
  const say = () => void stream.write(line);
  say();
  const timer = setInterval(say, everyMs);
  let tail: Buffer = Buffer.alloc(0);
  try {
    await readUntil(stream, (chunk) => {
      const seen = Buffer.concat([tail, chunk]);
      const at = seen.indexOf(line);
      if (at >= 0) return seen.subarray(at + line.length);
      tail = seen.subarray(-line.length);
      return undefined;
    });
  } finally {
    clearInterval(timer);
  }
}

/** The guest's side. Resolves when the host has begun to speak, with when it was answered (`performance.now()`). */
export async function answerSerialSession(stream: Duplex): Promise<number> {
  let pending: Buffer = Buffer.alloc(0);
  let answered = '';
  let answeredAt = 0;
  await readUntil(stream, (chunk) => {
    pending = Buffer.concat([pending, chunk]);
    while (pending.length >= lineLength) {
      const line = pending.subarray(0, lineLength).toString('latin1');
      if (linePattern.test(line)) {
        if (line !== answered) {
          // Before the host can have it: this may have to wait for the CPU for any time afterwards.
          answeredAt = performance.now();
          stream.write(line);
        }
        answered = line;
        pending = pending.subarray(lineLength);
      } else if (answered !== '') return pending;
      // What an earlier host has left behind.
      else pending = pending.subarray(Math.max(1, pending.indexOf(word, 1)));
    }
    const isLine = word.startsWith(pending.subarray(0, word.length).toString('latin1'));
    return answered !== '' && pending.length > 0 && !isLine ? pending : undefined;
  });
  return answeredAt;
}

/** Reads until `take` returns what belongs to whoever reads next. Rejects when the stream ends before. */
async function readUntil(stream: Duplex, take: (chunk: Buffer) => Buffer | undefined): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  const onData = (chunk: Buffer) => {
    const rest = take(chunk);
    if (rest === undefined) return;
    stream.pause();
    stream.off('data', onData);
    if (rest.length > 0) stream.unshift(rest);
    resolve();
  };
  const onEnd = () => reject(new Error('the stream ended'));
  stream.on('data', onData);
  for (const event of ['end', 'close', 'error'] as const) stream.once(event, onEnd);
  // Its events have been.
  if (stream.destroyed || stream.readableEnded) onEnd();
  try {
    await promise;
  } finally {
    stream.off('data', onData);
    for (const event of ['end', 'close', 'error'] as const) stream.off(event, onEnd);
  }
}
