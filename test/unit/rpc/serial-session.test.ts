import { once } from 'node:events';
import { Duplex, duplexPair } from 'node:stream';
import { describe, expect, test, vi } from 'vitest';
import { answerSerialSession, openSerialSession } from '../../../src/rpc/serial-session.ts';

const line = (token: string) => `kiln-session ${token.repeat(32)}\n`;

/** All that has come on a stream so far, while it flows. */
function collect(stream: Duplex): () => string {
  let text = '';
  stream.on('data', (chunk: Buffer) => {
    text += chunk.toString('latin1');
  });
  return () => text;
}

async function nextChunk(stream: Duplex): Promise<string> {
  const next = new Promise<Buffer>((resolve) => stream.once('data', resolve));
  stream.resume();
  const chunk = await next;
  stream.pause();
  return chunk.toString('latin1');
}

describe('a session on a byte stream', () => {
  test('is there when both sides are, and what they then say arrives', async () => {
    const [host, guest] = duplexPair();
    const [opened, answered] = [openSerialSession(host), answerSerialSession(guest)];
    await opened;
    host.write('PRI * HTTP/2.0');
    await answered;
    expect(await nextChunk(guest)).toBe('PRI * HTTP/2.0');
    guest.write('settings');
    expect(await nextChunk(host)).toBe('settings');
  });

  test('is opened whenever the guest comes, however often the host has said its line', async () => {
    vi.useFakeTimers({ toFake: ['setInterval', 'clearInterval'] });
    try {
      const [host, guest] = duplexPair();
      const opened = openSerialSession(host);
      vi.advanceTimersByTime(1000);
      const answered = answerSerialSession(guest);
      await opened;
      expect(vi.getTimerCount()).toBe(0);
      host.write('PRI');
      await answered;
      expect(await nextChunk(guest)).toBe('PRI');
    } finally {
      vi.useRealTimers();
    }
  });

  test('begins with none of what an earlier one has left, on either side', async () => {
    const [host, guest] = duplexPair();
    guest.write('half a frame kiln-session 00');
    host.write('a word of the last host, kiln-session, and more that is long enough to be looked at');
    const [opened, answered] = [openSerialSession(host), answerSerialSession(guest)];
    await opened;
    host.write('PRI');
    await answered;
    expect(await nextChunk(guest)).toBe('PRI');
  });

  test('is found in the smallest pieces', async () => {
    const [host, guest] = duplexPair();
    const answered = answerSerialSession(guest);
    const seen = collect(host);
    for (const byte of `rubbish${line('a')}${line('a')}PRI`) {
      host.write(byte);
      await new Promise((resolve) => setImmediate(resolve));
    }
    await answered;
    expect(seen()).toBe(line('a'));
    const rest = collect(guest);
    guest.resume();
    await vi.waitFor(() => expect(rest()).toBe('PRI'));
  });

  test('is answered once for each host', async () => {
    const [host, guest] = duplexPair();
    const answered = answerSerialSession(guest);
    const seen = collect(host);
    host.write(`${line('a')}${line('a')}${line('b')}${line('b')}P`);
    await answered;
    await vi.waitFor(() => expect(seen()).toBe(`${line('a')}${line('b')}`));
    expect(await nextChunk(guest)).toBe('P');
  });

  test('is not opened by another’s answer', async () => {
    const [host, guest] = duplexPair();
    const opened = openSerialSession(host);
    const said = await nextChunk(guest);
    guest.write(line('0'));
    guest.write('x'.repeat(100_000));
    guest.write(said);
    guest.write('rest');
    await opened;
    expect(await nextChunk(host)).toBe('rest');
  });

  test.each([
    ['ends', (stream: Duplex) => stream.push(null)],
    ['breaks', (stream: Duplex) => stream.destroy(new Error('EIO'))],
  ])('that %s before it began is an error, on both sides', async (_how, stop) => {
    for (const begin of [openSerialSession, answerSerialSession]) {
      const stream = new Duplex({ read() {}, write: (_chunk, _encoding, done) => done() });
      stream.on('error', () => {});
      const begun = begin(stream);
      stop(stream);
      await expect(begun).rejects.toThrow('the stream ended');
      expect(stream.listenerCount('data')).toBe(0);
    }
  });

  test('that had ended before is an error, on both sides', async () => {
    for (const begin of [openSerialSession, answerSerialSession]) {
      const stream = new Duplex({ read() {}, write: (_chunk, _encoding, done) => done() });
      const closed = once(stream, 'close');
      stream.destroy();
      await closed;
      await expect(begin(stream)).rejects.toThrow('the stream ended');
    }
  });
});
