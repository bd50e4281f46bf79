import { once } from 'node:events';
import { connect, createServer, type Socket } from 'node:net';
import { PassThrough } from 'node:stream';
import { Metadata, type ServiceError, status } from '@grpc/grpc-js';
import { afterEach, expect, it, vi } from 'vitest';
import {
  AgentClient,
  type AgentServer,
  AgentService,
  HelloRequest,
  HelloResponse,
  ReadOutputResponse,
  type WriteStdinRequest,
} from '../../../gen/kiln/agent/v1/agent.ts';
import { clientOverSocket, type SocketClient } from '../../../src/rpc/grpc/client-transport.ts';
import { type ServedSocket, serveOverSocket } from '../../../src/rpc/grpc/server-transport.ts';

// The agent's service serves as an example of every kind of call; its handlers here have nothing to do with containers.

const chunkSize = 64 * 1024;
const chunkCount = 1024;

/** Both ends of a connection, over a Unix socket in the abstract namespace. */
async function socketPair(): Promise<[Socket, Socket]> {
  const path = `\0kiln-grpc-test-${process.pid}`;
  const listener = createServer().listen(path);
  const ours = connect(path);
  const [theirs] = (await once(listener, 'connection')) as [Socket];
  listener.close();
  return [ours, theirs];
}

interface Ends {
  readonly client: AgentClient;
  readonly connection: SocketClient<AgentClient>;
  readonly served: ServedSocket;
  readonly sockets: [Socket, Socket];
  /** Messages that the streaming handler has been able to write. */
  written: number;
  /** Calls that the server has seen end as cancelled. */
  cancelled: number;
}

const opened: Ends[] = [];
afterEach(() => {
  for (const ends of opened.splice(0)) {
    ends.connection.close();
    ends.served.close();
  }
});

async function open(): Promise<Ends> {
  const sockets = await socketPair();
  const handlers: Partial<AgentServer> = {
    hello: (call, done) => {
      const { kilnVersion, hostname } = call.request;
      if (hostname !== 'never') return done(null, HelloResponse.fromPartial({ kilnVersion }));
      call.on('cancelled', () => {
        ends.cancelled += 1;
      });
    },
    readOutput: (call) => {
      const pump = () => {
        while (ends.written < chunkCount) {
          const data = Buffer.alloc(chunkSize, ends.written % 251);
          ends.written += 1;
          if (!call.write(ReadOutputResponse.fromPartial({ data }))) return;
        }
        call.end();
      };
      call.on('drain', pump);
      pump();
    },
    writeStdin: (call, done) => {
      let bytes = 0;
      call.on('data', (message: WriteStdinRequest) => {
        bytes += message.data.length;
      });
      call.on('end', () => done({ code: status.ABORTED, details: `${bytes} bytes` }));
    },
    removeContainer: (_call, done) => {
      done({ code: status.FAILED_PRECONDITION, details: 'container "käse" is running' });
    },
  };
  const served = serveOverSocket(AgentService, handlers as AgentServer, sockets[1]);
  const connection = clientOverSocket(AgentClient, sockets[0], { peer: 'the guest' });
  const ends: Ends = { client: connection.client, connection, served, sockets, written: 0, cancelled: 0 };
  opened.push(ends);
  return ends;
}

/** A unary call; resolves to its answer or its error. */
function hello(client: AgentClient, { hostname = '', timeout = 0 } = {}): Promise<string | ServiceError> {
  const options = timeout === 0 ? {} : { deadline: Date.now() + timeout };
  return new Promise((resolve) => {
    client.hello(
      HelloRequest.fromPartial({ kilnVersion: '1.2', hostname }),
      new Metadata(),
      options,
      (error, response) => resolve(error ?? response.kilnVersion),
    );
  });
}

/** Resolves when the server has seen the calls in flight: calls of one connection arrive in order. */
const settled = (client: AgentClient) => hello(client);

it('answers a unary call', async () => {
  const { client } = await open();
  expect(await hello(client)).toBe('1.2');
  expect(await Promise.all(Array.from({ length: 100 }, () => hello(client)))).toEqual(Array(100).fill('1.2'));
});

it('does not say the time of day with its answers', async () => {
  const { client } = await open();
  const call = client.hello(HelloRequest.fromPartial({}), () => {});
  const [metadata] = (await once(call, 'metadata')) as [Metadata];
  expect(metadata.getMap()).toMatchObject({ 'content-type': 'application/grpc+proto' });
  expect(metadata.get('date')).toEqual([]);
});

it("hands a handler's error on with its code and text", async () => {
  const { client } = await open();
  const error = await new Promise((resolve) =>
    client.removeContainer({ id: '', force: false, guestEnds: false }, resolve),
  );
  expect(error).toMatchObject({ code: status.FAILED_PRECONDITION, details: 'container "käse" is running' });
});

it('says UNIMPLEMENTED for a method that the server does not have', async () => {
  const { client } = await open();
  const error = await new Promise((resolve) =>
    client.startContainer({ id: '', network: undefined, stdinEnded: false }, resolve),
  );
  expect(error).toMatchObject({ code: status.UNIMPLEMENTED });
});

it('streams 64 MiB from the server, byte for byte', async () => {
  const { client } = await open();
  let count = 0;
  for await (const { data } of client.readOutput() as AsyncIterable<ReadOutputResponse>) {
    if (!data.equals(Buffer.alloc(chunkSize, count % 251))) expect.unreachable(`chunk ${count} differs`);
    count += 1;
  }
  expect(count).toBe(chunkCount);
});

it('holds the writer back while the reader does not read, and other calls go on', async () => {
  const ends = await open();
  const call = ends.client.readOutput();
  await once(call, 'readable');
  // Each answer is a round trip in which the server could write more; it stops when the windows are full.
  let before = -1;
  while (ends.written !== before) {
    before = ends.written;
    for (let i = 0; i < 20; i++) expect(await hello(ends.client)).toBe('1.2');
  }
  // One stream's window of 1 MiB, and what Node's streams and sockets on both sides hold.
  expect(ends.written * chunkSize).toBeLessThan(6 << 20);
  let received = 0;
  for await (const message of call as AsyncIterable<ReadOutputResponse>) received += message.data.length;
  expect(received).toBe(chunkSize * chunkCount);
});

it('streams 64 MiB to the server', async () => {
  const { client } = await open();
  const answer = Promise.withResolvers<ServiceError | null>();
  const call = client.writeStdin((error) => answer.resolve(error));
  for (let i = 0; i < chunkCount; i++) {
    if (!call.write({ id: '', execId: '', data: Buffer.alloc(chunkSize) })) await once(call, 'drain');
  }
  call.end();
  expect((await answer.promise)?.details).toBe(`${chunkSize * chunkCount} bytes`);
});

it('takes a message of several MiB, and refuses one that is too large', async () => {
  const { client } = await open();
  const send = (size: number) =>
    new Promise<ServiceError | null>((resolve) => {
      const call = client.writeStdin((error) => resolve(error));
      call.on('error', () => {});
      call.end({ id: '', execId: '', data: Buffer.alloc(size) });
    });
  expect((await send(8 << 20))?.details).toBe(`${8 << 20} bytes`);
  expect((await send(17 << 20))?.code).toBe(status.RESOURCE_EXHAUSTED);
});

it('tells the server when a call is cancelled', async () => {
  const ends = await open();
  const call = ends.client.hello(HelloRequest.fromPartial({ hostname: 'never' }), (error) => {
    expect(error?.code).toBe(status.CANCELLED);
  });
  await settled(ends.client);
  call.cancel();
  await settled(ends.client);
  expect(ends.cancelled).toBe(1);
});

it('ends a call when its time is over, also at the server', async () => {
  const ends = await open();
  const error = await hello(ends.client, { hostname: 'never', timeout: 20 });
  expect(error).toMatchObject({ code: status.DEADLINE_EXCEEDED });
  expect(await hello(ends.client, { timeout: -1 })).toMatchObject({ code: status.DEADLINE_EXCEEDED });
  await settled(ends.client);
  expect(ends.cancelled).toBe(1);
});

it.each([
  ['breaks', (ends: Ends) => ends.sockets[1].destroy()],
  ['is closed by the server', (ends: Ends) => ends.served.close()],
  ['is closed by the client', (ends: Ends) => ends.connection.close()],
])('fails every call with UNAVAILABLE when the connection %s', async (_how, end) => {
  const ends = await open();
  const unary = hello(ends.client, { hostname: 'never', timeout: 600_000 });
  const output = ends.client.readOutput();
  const outputError = once(output, 'error');
  const input = new Promise<ServiceError | null>((resolve) => {
    ends.client.writeStdin((error) => resolve(error)).write({ id: '', execId: '', data: Buffer.alloc(10) });
  });
  await settled(ends.client);
  end(ends);
  const unavailable = { code: status.UNAVAILABLE, details: expect.stringContaining('the guest') };
  expect(await unary).toMatchObject(unavailable);
  output.resume();
  expect((await outputError)[0]).toMatchObject(unavailable);
  expect(await input).toMatchObject(unavailable);
  await ends.served.closed;
  expect(await ends.connection.closed).toBeInstanceOf(Error);
  // And so does every later call, at once.
  expect(await hello(ends.client)).toMatchObject(unavailable);
  expect(await hello(ends.client, { timeout: 600_000 })).toMatchObject(unavailable);
});

it('leaves nothing that keeps the process alive', async () => {
  const handles = () =>
    process
      .getActiveResourcesInfo()
      .filter((kind) => /wrap|http2|timeout/i.test(kind))
      .sort();
  const leftOf = async () => {
    const before = handles();
    const ends = await open();
    await hello(ends.client, { timeout: 600_000 });
    void hello(ends.client, { hostname: 'never', timeout: 600_000 });
    await settled(ends.client);
    ends.connection.close();
    await ends.served.closed;
    await ends.connection.closed;
    await vi.waitFor(() => expect(handles()).toEqual(before));
  };
  // Timers of vitest come and go beside it; what is ours would be left each time.
  await vi.waitFor(leftOf, { timeout: 10_000 });
});

it('works on any stream, and on one that is dead already says so', async () => {
  const dead = new PassThrough();
  dead.destroy();
  using connection = clientOverSocket(AgentClient, dead, { peer: 'the guest' });
  expect(await hello(connection.client)).toMatchObject({ code: status.UNAVAILABLE });
  expect(await connection.closed).toBeInstanceOf(Error);
});

it('survives a peer that does not speak HTTP/2', async () => {
  const [ours, theirs] = await socketPair();
  const served = serveOverSocket(AgentService, {} as AgentServer, theirs);
  ours.on('error', () => {});
  ours.write('GET / HTTP/1.1\r\n\r\n');
  await served.closed;

  const [client, garbage] = await socketPair();
  using connection = clientOverSocket(AgentClient, client, { peer: 'the guest' });
  garbage.on('error', () => {});
  garbage.write(Buffer.alloc(1000, 0xff));
  expect(await hello(connection.client)).toMatchObject({ code: status.UNAVAILABLE });
  expect((await connection.closed).message).not.toBe('');
  garbage.destroy();
});
