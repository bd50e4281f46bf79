import { createSocket } from 'node:dgram';
import { once } from 'node:events';
import { chmodSync, readFileSync, writeFileSync } from 'node:fs';
import { connect, type Socket } from 'node:net';
import { type ClientDuplexStream, status } from '@grpc/grpc-js';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import type { AgentClient, RelayQueriesRequest, RelayQueriesResponse } from '../../../gen/kiln/agent/v1/agent.ts';
import { DnsMessages, frameDnsMessage } from '../../../src/sys/dns-stream.ts';
import { dnsAnswer, dnsQuery } from '../../support/dns.ts';
import { hello, TestAgent, unary } from './agent.ts';

const dockers = Buffer.from([127, 0, 0, 11]);
const query = dnsQuery('name.test');
const answer = dnsAnswer(query, ['10.0.0.1']);

/** Notes what it is told to redirect, a line each; refuses one address. */
const program = `#!/bin/sh
if [ "$2" = 127.0.0.66 ]; then echo 'no such thing' >&2; exit 1; fi
echo "$2 $3 $4" >>"\${0%/*}/redirects"
`;

describe('name servers of the host', () => {
  let agent: TestAgent;
  let client: AgentClient;
  const cleanups: (() => void)[] = [];
  beforeAll(async () => {
    agent = new TestAgent();
    writeFileSync(agent.nameserversProgram, program);
    chmodSync(agent.nameserversProgram, 0o755);
    client = await agent.accept();
    await hello(client);
  });
  afterEach(() => {
    for (const cleanup of cleanups.splice(0)) cleanup();
  });
  afterAll(() => agent[Symbol.asyncDispose]());

  const serve = (...addresses: Buffer[]) => unary((done) => client.serveNameservers({ addresses }, done));
  const redirects = () => readFileSync(`${agent.directory}/redirects`, 'utf8').trim().split('\n');
  /** Whatever was called before has reached the agent when this has an answer. */
  async function portOf(address: Buffer): Promise<number> {
    await serve(address);
    return Number(
      redirects()
        .find((line) => line.startsWith(`${[...address].join('.')} `))
        ?.split(' ')[2],
    );
  }

  type Relay = ClientDuplexStream<RelayQueriesRequest, RelayQueriesResponse>;
  function relay(onQuery: (query: RelayQueriesResponse, call: Relay) => void): Relay {
    const call = client.relayQueries();
    call.on('error', () => {});
    call.on('data', (data: RelayQueriesResponse) => onQuery(data, call));
    cleanups.push(() => call.cancel());
    return call;
  }
  const say = (call: Relay, id: number, message: Buffer, refused = false) =>
    void call.write({ id, answer: message, refused });

  async function askByUdp(port: number, message: Buffer): Promise<Buffer> {
    const socket = createSocket('udp4');
    cleanups.push(() => socket.close());
    socket.send(message, port, '127.0.0.11');
    const [given] = (await once(socket, 'message')) as [Buffer];
    return given;
  }

  async function dial(port: number): Promise<Socket> {
    const socket = connect(port, '127.0.0.11');
    cleanups.push(() => socket.destroy());
    socket.on('error', () => {});
    await once(socket, 'connect');
    return socket;
  }

  it('are served once each, and ports of the agent are redirected to', async () => {
    await Promise.all([serve(dockers, dockers), serve(dockers)]);
    expect(redirects().filter((line) => line.startsWith('127.0.0.11 '))).toEqual([
      expect.stringMatching(/^127\.0\.0\.11 127\.0\.0\.11 \d+$/),
    ]);
    await serve(Buffer.from([...new Array<number>(15).fill(0), 1]));
    expect(redirects().at(-1)).toMatch(/^0:0:0:0:0:0:0:1 ::1 \d+$/);
  });

  it('are not served where that cannot be', async () => {
    await expect(serve(Buffer.from([127, 0, 0, 66]))).rejects.toMatchObject({
      code: status.INTERNAL,
      details: 'cannot take queries for 127.0.0.66: no such thing',
    });
    await expect(serve(Buffer.from([1, 2, 3]))).rejects.toMatchObject({ code: status.INVALID_ARGUMENT });
  });

  it('are asked by UDP, each query by its own name', async () => {
    relay(({ id, nameserver, tcp, query: message }, call) => {
      expect([nameserver, tcp]).toEqual([dockers, false]);
      say(call, id, dnsAnswer(message, [`10.0.0.${message.readUInt16BE()}`]));
    });
    const port = await portOf(dockers);
    const queries = [1, 2, 3, 4].map((id) => dnsQuery(`name${id}.test`, id));
    const answers = await Promise.all(queries.map((each) => askByUdp(port, each)));
    expect(answers).toEqual(queries.map((each, index) => dnsAnswer(each, [`10.0.0.${index + 1}`])));
  });

  it('are asked by TCP, several times on a connection', async () => {
    const large = Buffer.concat([answer, Buffer.alloc(60_000)]);
    relay(({ id, tcp, query: message }, call) => {
      expect(tcp).toBe(true);
      expect(message).toEqual(query);
      say(call, id, large);
    });
    const socket = await dial(await portOf(dockers));
    const messages = new DnsMessages();
    const found: Buffer[] = [];
    socket.write(frameDnsMessage(query));
    for await (const data of socket as AsyncIterable<Buffer>) {
      found.push(...messages.push(data));
      if (found.length === 1) socket.write(frameDnsMessage(query));
      if (found.length === 2) break;
    }
    expect(found).toEqual([large, large]);
  });

  it('where nobody listens, get a failure as their answer', async () => {
    const call = relay(({ id }) => say(call, id, Buffer.alloc(0), true));
    const failure = Buffer.from(query);
    failure.writeUInt16BE(0x8182, 2);
    const port = await portOf(dockers);
    expect(await askByUdp(port, query)).toEqual(failure);
    const socket = await dial(port);
    socket.write(frameDnsMessage(query));
    const [data] = (await once(socket, 'data')) as [Buffer];
    expect(data).toEqual(frameDnsMessage(failure));
  });

  it('that do not answer, have their connections ended', async () => {
    const call = relay(({ id }) => say(call, id, Buffer.alloc(0)));
    const socket = await dial(await portOf(dockers));
    socket.write(frameDnsMessage(query));
    await once(socket, 'close');
  });

  it('are asked by the latest call; what an earlier one, or none, was asked is given up', async () => {
    const port = await portOf(dockers);
    const asked = Promise.withResolvers<void>();
    const first = relay(() => asked.resolve());
    await serve(dockers);
    const waiting = await dial(port);
    waiting.write(frameDnsMessage(query));
    await asked.promise;
    const ended = once(first, 'end');
    const second = relay(({ id }) => say(second, id, answer));
    await Promise.all([once(waiting, 'close'), ended]);
    expect(await askByUdp(port, query)).toEqual(answer);
    second.cancel();
    // Until the agent has seen that, a query may still be sent by the call.
    const late = await dial(port);
    late.write(frameDnsMessage(query));
    await once(late, 'close');
  });

  it('get no more than a number of queries at a time', async () => {
    const port = await portOf(dockers);
    const seen: number[] = [];
    const all = Promise.withResolvers<void>();
    relay(({ id }) => {
      seen.push(id);
      if (seen.length === 128) all.resolve();
    });
    const first = await dial(port);
    await serve(dockers);
    first.write(Buffer.concat(Array.from({ length: 128 }, () => frameDnsMessage(query))));
    await all.promise;
    const second = await dial(port);
    second.write(frameDnsMessage(query));
    await once(second, 'close');
    expect(new Set(seen).size).toBe(128);
  });
});
