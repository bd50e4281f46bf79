import { once } from 'node:events';
import net from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { QmpClient } from '../../../src/vmm/qemu/qmp.ts';

const greeting = '{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": ["oob"]}}\r\n';

describe('the QMP client', () => {
  let server: net.Server;
  let client: QmpClient;
  /** QEMU's end of a real socket pair. */
  let qemu: net.Socket;
  let received: string;

  beforeEach(async () => {
    const socketPath = path.join(tmpdir(), `kiln-qmp-${process.pid}-${Math.random().toString(36).slice(2)}`);
    server = net.createServer().listen(socketPath);
    await once(server, 'listening');
    const [[accepted]] = await Promise.all([
      once(server, 'connection') as Promise<[net.Socket]>,
      new Promise<void>((resolve) => {
        qemu = net.connect(socketPath, resolve);
      }),
    ]);
    client = new QmpClient(accepted);
    received = '';
    qemu.on('data', (chunk) => {
      received += chunk;
    });
    qemu.on('error', () => {});
  });
  afterEach(() => {
    client.close();
    qemu.destroy();
    server.close();
  });

  /** Waits for the next command and takes it. */
  async function command(): Promise<{ execute: string; arguments: object; id: number }> {
    while (!received.includes('\n')) await once(qemu, 'data');
    const end = received.indexOf('\n');
    const line = received.slice(0, end);
    received = received.slice(end + 1);
    return JSON.parse(line);
  }

  async function negotiate(): Promise<void> {
    const done = client.negotiate();
    const { id, execute } = await command();
    expect(execute).toBe('qmp_capabilities');
    qemu.write(greeting);
    qemu.write(`{"return": {}, "id": ${id}}\r\n`);
    await done;
  }

  test('says what it knows to say before the greeting, in order', async () => {
    const done = Promise.all([client.negotiate(), client.execute('query-status')]);
    const [one, two] = [await command(), await command()];
    expect([one.execute, two.execute]).toEqual(['qmp_capabilities', 'query-status']);
    qemu.write(`${greeting}{"return": {}, "id": ${one.id}}\r\n{"return": {}, "id": ${two.id}}\r\n`);
    await done;
  });

  test('hears nothing before it is told to, where it was made so, and all of it then', async () => {
    const socketPath = server.address() as string;
    const accepted = once(server, 'connection') as Promise<[net.Socket]>;
    const unheard = new QmpClient(net.connect(socketPath), { unheard: true });
    const events: string[] = [];
    unheard.on('event', (name) => events.push(name));
    const closed = once(unheard, 'close');
    const [other] = await accepted;
    other.end('{"event": "RESUME"}\n{"event": "STOP"}\n');
    await once(other, 'finish');
    await new Promise((resolve) => setTimeout(resolve, 20));
    expect(events).toEqual([]);
    unheard.hear();
    await closed;
    expect(events).toEqual(['RESUME', 'STOP']);
    expect(unheard.closedByPeer).toBe(true);
  });

  test('gives each command its own answer, in whatever order they come', async () => {
    await negotiate();
    const first = client.execute('query-status');
    const second = client.execute('ringbuf-read', { device: 'console', size: 10 });
    const one = await command();
    const two = await command();
    expect(two).toMatchObject({ execute: 'ringbuf-read', arguments: { device: 'console', size: 10 } });
    qemu.write(`{"return": "two", "id": ${two.id}}\n{"return": "one", "id": ${one.id}}\n`);
    expect(await first).toBe('one');
    expect(await second).toBe('two');
  });

  test('throws what QEMU says when it refuses a command', async () => {
    await negotiate();
    const refused = client.execute('blockdev-add');
    const { id } = await command();
    qemu.write(`{"error": {"class": "GenericError", "desc": "Could not open '/x'"}, "id": ${id}}\n`);
    await expect(refused).rejects.toMatchObject({
      code: 'internal',
      message: "QEMU refused blockdev-add: Could not open '/x'",
    });
  });

  test('reports events, with and without data, also between command and answer', async () => {
    await negotiate();
    const events: [string, object][] = [];
    const both = new Promise<void>((resolve) => {
      client.on('event', (name, data) => {
        if (events.push([name, data]) === 2) resolve();
      });
    });
    const done = client.execute('cont');
    const { id } = await command();
    qemu.write(`{"event": "STOP", "timestamp": {}}\n{"return": {}, "id": ${id}}\n`);
    qemu.write('{"event": "SHUTDOWN", "data": {"guest": true}}\n{"return": {}, "id": 999}\n\n');
    await done;
    await both;
    expect(events).toEqual([
      ['STOP', {}],
      ['SHUTDOWN', { guest: true }],
    ]);
  });

  test('puts lines together that come byte by byte, also inside of a character', async () => {
    await negotiate();
    const done = client.execute('ringbuf-read');
    const { id } = await command();
    for (const byte of Buffer.from(`{"return": "grüße €", "id": ${id}}\n`)) {
      qemu.write(Buffer.of(byte));
      await new Promise((resolve) => setImmediate(resolve));
    }
    expect(await done).toBe('grüße €');
  });

  test('fails the greeting, the commands under way and all later ones when QEMU hangs up', async () => {
    const greeted = client.negotiate();
    const early = client.execute('early');
    qemu.end();
    await once(client, 'close');
    const gone = (at: string) => ({
      code: 'unavailable',
      message: `QEMU has closed its control connection (at ${at})`,
    });
    await expect(greeted).rejects.toMatchObject(gone('qmp_capabilities'));
    await expect(early).rejects.toMatchObject(gone('early'));
    await expect(client.execute('late')).rejects.toMatchObject(gone('late'));
    expect(client.closedByPeer).toBe(true);
  });

  test('fails the commands under way when it is closed from this side', async () => {
    await negotiate();
    const pending = client.execute('cont');
    client.close();
    client.close();
    await expect(pending).rejects.toMatchObject({ code: 'unavailable' });
    expect(client.closedByPeer).toBe(false);
  });

  test.each([
    ['no JSON', 'Segmentation fault\n'],
    ['null', 'null\n'],
    ['a number', '42\n'],
    ['an array', '[{"QMP": {}}]\n'],
    ['half an object', '{"return": {\n'],
  ])('closes the connection at %s in place of a message, and repeats it in the error', async (_name, line) => {
    await negotiate();
    const pending = client.execute('cont');
    qemu.write(line);
    await expect(pending).rejects.toMatchObject({
      code: 'unavailable',
      message: `QEMU sent a line that is not QMP: ${line.trim()} (at cont)`,
    });
    expect(client.closedByPeer).toBe(false);
  });

  test('closes the connection when QEMU could not read a command, instead of waiting for its answer', async () => {
    await negotiate();
    const pending = client.execute('cont');
    qemu.write('{"error": {"class": "GenericError", "desc": "JSON parse error"}}\n');
    await expect(pending).rejects.toThrow(/could not read a command: .*JSON parse error/);
  });

  test('survives fields of a wrong type', async () => {
    await negotiate();
    const refused = client.execute('cont');
    const { id } = await command();
    const event = once(client, 'event');
    qemu.write(`{"event": "STOP", "data": null}\n{"error": {}, "id": ${id}}\n`);
    expect(await event).toEqual(['STOP', {}]);
    await expect(refused).rejects.toThrow('QEMU refused cont: undefined');
  });

  test('does not collect a line without end', async () => {
    await negotiate();
    const pending = client.execute('cont');
    qemu.write(Buffer.alloc((1 << 20) + 1, 'x'));
    await expect(pending).rejects.toThrow(/a line of more than 1048576 bytes/);
  });

  test('takes a line as long as a full console whose every byte is escaped', async () => {
    await negotiate();
    const pending = client.execute('ringbuf-read');
    const { id } = await command();
    qemu.write(`{"return": "${'\\u0001'.repeat(65536)}", "id": ${id}}\n`);
    expect(await pending).toHaveLength(65536);
  });

  test('is closed from the start on a socket that was closed before', async () => {
    client.close();
    const late = net.connect(server.address() as string, () => late.destroy());
    await once(late, 'close');
    await expect(new QmpClient(late).negotiate()).rejects.toMatchObject({ code: 'unavailable' });
  });

  test('shows what QEMU says without control characters, and not all of it', async () => {
    await negotiate();
    const refused = client.execute('stop');
    const { id } = await command();
    qemu.write(`${JSON.stringify({ error: { desc: `no\u001b[2J\u202e${'x'.repeat(9000)}` }, id })}\n`);
    await expect(refused).rejects.toThrow(/^QEMU refused stop: nox{480,500}$/);
  });
});
