import { closeSync } from 'node:fs';
import { type AddressInfo, createServer, type Server } from 'node:net';
import { afterEach, describe, expect, it } from 'vitest';
import { bindLoopback } from '../../../src/sys/loopback.ts';

const servers: Server[] = [];
afterEach(() => {
  for (const server of servers.splice(0)) server.close();
});

async function listen(fd: number): Promise<AddressInfo> {
  const server = createServer();
  servers.push(server);
  await new Promise<void>((resolve) => server.listen({ fd }, resolve));
  return server.address() as AddressInfo;
}

describe('bindLoopback', () => {
  it('binds 127.0.0.1 or ::1, for a server to listen', async () => {
    const { address, port } = await listen(bindLoopback('ipv4', 0));
    expect(address).toBe('127.0.0.1');
    // The same port of the other family is another one.
    expect(await listen(bindLoopback('ipv6', port))).toMatchObject({ address: '::1', port });
  });

  it('refuses a port on which somebody listens', async () => {
    const { port } = await listen(bindLoopback('ipv4', 0));
    expect(() => closeSync(bindLoopback('ipv4', port))).toThrow(expect.objectContaining({ code: 'EADDRINUSE' }));
  });
});
