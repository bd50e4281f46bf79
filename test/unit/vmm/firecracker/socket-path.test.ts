import { once } from 'node:events';
import { existsSync, mkdtempSync, renameSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import net from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { holdSocket } from '../../../../src/vmm/firecracker/socket-path.ts';

let folder: string;
const servers: net.Server[] = [];
beforeEach(() => {
  folder = mkdtempSync(path.join(tmpdir(), 'kiln-s'));
});
afterEach(() => {
  for (const server of servers.splice(0)) server.close();
  rmSync(folder, { recursive: true });
});

async function serve(name: string): Promise<string> {
  const server = net.createServer((socket) => socket.end(name));
  servers.push(server);
  await once(server.listen(path.join(folder, name)), 'listening');
  return path.join(folder, name);
}

test('a socket that is held is the one that was there, whatever comes in its place', async () => {
  const file = await serve('own');
  using held = holdSocket(file);
  renameSync(file, path.join(folder, 'moved'));
  symlinkSync(await serve('foreign'), file);
  const [words] = await once(net.connect(held.path), 'data');
  expect(String(words)).toBe('own');
});

test('a link to a socket is not followed, and what is no socket is none', async () => {
  const link = path.join(folder, 'link');
  symlinkSync(await serve('foreign'), link);
  expect(() => holdSocket(link)).toThrow(`${link} is no socket`);
  const file = path.join(folder, 'file');
  writeFileSync(file, '');
  expect(() => holdSocket(file)).toThrow(`${file} is no socket`);
  expect(() => holdSocket('/no/socket')).toThrow(
    expect.objectContaining({ code: 'unavailable', message: 'there is no socket /no/socket: ENOENT' }),
  );
});

test('letting go closes its descriptor', async () => {
  const held = holdSocket(await serve('own'));
  held[Symbol.dispose]();
  expect(existsSync(held.path)).toBe(false);
});
