import { Duplex, PassThrough, Writable } from 'node:stream';
import type { ServerDuplexStream } from '@grpc/grpc-js';
import { afterEach, describe, expect, it, vi } from 'vitest';
import {
  type AgentClient,
  OutputStream,
  type ReadOutputRequest,
  type ReadOutputResponse,
  WaitProcessResponse,
} from '../../../gen/kiln/agent/v1/agent.ts';
import type { KilnError } from '../../../src/errors.ts';
import type { Guest } from '../../../src/guest/guest.ts';
import { pipeOutputs } from '../../../src/guest/streams.ts';
import {
  connectGuest,
  failure,
  helloResponse,
  type OutputRequest,
  outputOf,
  pipeOutput,
  type Script,
  tellExit,
} from './scripted-agent.ts';

const cleanups: (() => void)[] = [];
afterEach(() => {
  for (const cleanup of cleanups.splice(0)) cleanup();
});

const session = 'the secret of the sandbox';
const ref = { id: 'c1', execId: 'e1' };
const stdout: OutputRequest = { ...ref, stream: 'stdout', from: 0 };

async function connect(script: Script = {}, returning = false): Promise<Guest> {
  return (await connectGuest(script, cleanups, { session, returning })).guest;
}

type OutputCall = ServerDuplexStream<ReadOutputRequest, ReadOutputResponse>;

/** Takes a chunk when it is told to. */
class HeldSink extends Writable {
  readonly #pending: { readonly data: Buffer; readonly done: (error?: Error) => void }[] = [];
  taken = '';

  override _write(data: Buffer, _encoding: string, done: (error?: Error) => void): void {
    this.#pending.push({ data, done });
  }

  /** Resolves when one more chunk has been given to it, and is taken. */
  async take(): Promise<void> {
    await vi.waitFor(() => expect(this.#pending.length).toBeGreaterThan(0), { interval: 1 });
    const { data, done } = this.#pending.shift()!;
    this.taken += data.toString();
    done();
  }
}

/** An agent that sends these chunks at once, then nothing until the test ends the stream. */
function sending(...chunks: string[]) {
  const requests: ReadOutputRequest[] = [];
  const end = Promise.withResolvers<void>();
  const readOutput: Script['readOutput'] = (call) => {
    call.on('data', (request: ReadOutputRequest) => requests.push(request));
    call.on('error', () => {});
    for (const chunk of chunks) call.write(outputOf(chunk));
    void end.promise.then(() => call.end());
  };
  return { requests, end: end.resolve, script: { readOutput } satisfies Script };
}

describe('output', () => {
  it('is acknowledged when the sink has taken it, and no byte before', async () => {
    const agent = sending('one', 'three');
    const guest = await connect(agent.script);
    const sink = new HeldSink();
    const progress: number[] = [];
    const relay = pipeOutput(guest, stdout, sink, (offset) => progress.push(offset));
    const delivered = () => agent.requests.slice(1).map((request) => request.delivered);
    await vi.waitFor(() => expect(sink.writableLength).toBe(8), { interval: 1 });
    // A round trip, in which an acknowledgement would arrive.
    await guest.processes('c1');
    expect(progress).toEqual([]);
    expect(delivered()).toEqual([]);
    await sink.take();
    await vi.waitFor(() => expect(delivered()).toEqual([3n]), { interval: 1 });
    expect(progress).toEqual([3]);
    await sink.take();
    await vi.waitFor(() => expect(delivered()).toEqual([3n, 8n]), { interval: 1 });
    expect(progress).toEqual([3, 8]);
    agent.end();
    await relay;
    expect(sink.taken).toBe('onethree');
  });

  it('is read on from where it is told, and offsets go on from there', async () => {
    const agent = sending('more');
    const guest = await connect(agent.script);
    const progress: number[] = [];
    const relay = pipeOutput(guest, { ...stdout, from: 1_000_000_007 }, new PassThrough().resume(), (offset) =>
      progress.push(offset),
    );
    await vi.waitFor(() => expect(agent.requests.length).toBe(2), { interval: 1 });
    agent.end();
    await relay;
    expect(progress).toEqual([1_000_000_011]);
    expect(agent.requests[0]).toMatchObject({ ...ref, delivered: 1_000_000_007n });
    expect(agent.requests[1]).toMatchObject({ id: '', execId: '', delivered: 1_000_000_011n });
  });

  it('is delivered when the relay ends, to a sink that is slow to take the last of it', async () => {
    const agent = sending('all');
    const guest = await connect(agent.script);
    const sink = new HeldSink();
    let over = false;
    const relay = pipeOutput(guest, stdout, sink, () => {}).then(() => (over = true));
    agent.end();
    await vi.waitFor(() => expect(sink.writableLength).toBe(3), { interval: 1 });
    await guest.processes('c1');
    expect(over).toBe(false);
    await sink.take();
    await relay;
  });

  it('ends with a sink that is destroyed, and never says what became of its chunk', async () => {
    const agent = sending('lost');
    const guest = await connect(agent.script);
    const sink = new Writable({ write: () => {} });
    const progress: number[] = [];
    const relay = pipeOutput(guest, stdout, sink, (offset) => progress.push(offset));
    agent.end();
    await vi.waitFor(() => expect(sink.writableLength).toBe(4), { interval: 1 });
    await guest.processes('c1');
    sink.destroy();
    await relay;
    expect(progress).toEqual([]);
  });

  it('of an agent that reads no acknowledgements does not make them pile up', async () => {
    const call = Object.assign(new Duplex({ objectMode: true, read: () => {}, write: () => {} }), {
      cancel: () => void call.destroy(),
    });
    const client = { readOutput: () => call } as unknown as AgentClient;
    let delivered = 0;
    const sink = new Writable({ write: (_data, _encoding, done) => done() });
    const [relay] = pipeOutputs(client, ref, [{ ...stdout, sink, onDelivered: (offset) => (delivered = offset) }]);
    for (let i = 0; i < 10_000; i++) call.push(outputOf('x'));
    call.push(null);
    await relay?.ended;
    expect(delivered).toBe(10_000);
    expect(call.writableLength).toBeLessThan(50);
  });

  it('that an agent refuses for its offset is out of range', async () => {
    const readOutput: Script['readOutput'] = (call) => call.emit('error', failure('OUT_OF_RANGE', 'byte 7'));
    const guest = await connect({ readOutput });
    await expect(pipeOutput(guest, { ...stdout, from: 7 }, new PassThrough(), () => {})).rejects.toMatchObject({
      code: 'out-of-range',
      message: 'byte 7',
    });
  });

  it('may come in empty messages, which are acknowledged as nothing', async () => {
    const agent = sending('', 'x', '');
    const guest = await connect(agent.script);
    const progress: number[] = [];
    const relay = pipeOutput(guest, stdout, new PassThrough().resume(), (offset) => progress.push(offset));
    agent.end();
    await relay;
    expect(Math.max(...progress)).toBe(1);
  });
});

describe('both outputs of a process', () => {
  /** An agent that gives them in one call, in which the test speaks. */
  async function joined() {
    const called = Promise.withResolvers<OutputCall>();
    const requests: ReadOutputRequest[] = [];
    const { guest, agent } = await connectGuest(
      {
        hello: (_call, done) => done(null, helloResponse({ features: ['ps', 'outputs'] })),
        readOutput: (call) => {
          call.on('data', (request: ReadOutputRequest) => requests.push(request));
          call.on('error', () => {});
          called.resolve(call);
        },
      },
      cleanups,
    );
    const sinks = { stdout: new HeldSink(), stderr: new HeldSink() };
    const progress: string[] = [];
    const piped = guest.pipeOutputs(
      ref,
      (['stdout', 'stderr'] as const).map((stream, index) => {
        const onDelivered = (offset: number) => progress.push(`${stream} ${offset}`);
        return { stream, from: index * 1000, sink: sinks[stream], onDelivered };
      }),
    );
    const over: string[] = [];
    for (const { stream, ended } of piped) void ended.then(() => over.push(stream)).catch(() => {});
    const told = () => requests.slice(1).map((request) => [request.delivered, request.stderrDelivered]);
    return { guest, agent, call: await called.promise, requests, sinks, progress, piped, over, told };
  }

  it('are asked for in one call, and acknowledged by themselves', async () => {
    const { agent, call, requests, sinks, progress, piped, told, over } = await joined();
    await vi.waitFor(() => expect(requests.length).toBe(1), { interval: 1 });
    const both = { stream: OutputStream.OUTPUT_STREAM_STDOUT, delivered: 0n, stderrDelivered: 1000n };
    expect(requests[0]).toEqual({ ...ref, ...both });
    call.write(outputOf('out'));
    call.write(outputOf('error', { stderr: true }));
    await sinks.stderr.take();
    await vi.waitFor(() => expect(told()).toEqual([[0n, 1005n]]), { interval: 1 });
    await sinks.stdout.take();
    await vi.waitFor(() => expect(told().at(-1)).toEqual([3n, 1005n]), { interval: 1 });
    expect(progress).toEqual(['stderr 1005', 'stdout 3']);
    call.write(outputOf('', { ended: true }));
    await piped[0]?.ended;
    expect(over).toEqual(['stdout']);
    call.write(outputOf('!', { stderr: true }));
    await sinks.stderr.take();
    call.write(outputOf('', { stderr: true, ended: true }));
    await piped[1]?.ended;
    expect(sinks.stderr.taken).toBe('error!');
    expect(agent.calls.filter((name) => name === 'readOutput')).toHaveLength(1);
  });

  it('wait for nobody but their own reader', async () => {
    const { call, sinks, piped, told } = await joined();
    for (const text of ['a', 'b', 'c', 'd']) call.write(outputOf(text, { stderr: true }));
    for (const text of ['1', '2', '3']) {
      call.write(outputOf(text));
      await sinks.stdout.take();
    }
    call.write(outputOf('', { ended: true }));
    await piped[0]?.ended;
    expect(sinks.stdout.taken).toBe('123');
    expect(told().at(-1)).toEqual([3n, 1000n]);
  });

  it('go on without one whose reader is gone; the call is given up with the last', async () => {
    const { call, sinks, piped, told } = await joined();
    const cancelled = new Promise((resolve) => call.on('cancelled', resolve));
    sinks.stdout.destroy();
    await piped[0]?.ended;
    call.write(outputOf('dropped'));
    call.write(outputOf('kept', { stderr: true }));
    await sinks.stderr.take();
    await vi.waitFor(() => expect(told()).toEqual([[0n, 1004n]]), { interval: 1 });
    sinks.stderr.destroy();
    await piped[1]?.ended;
    await cancelled;
  });

  it('both fail with their call', async () => {
    const { call, piped } = await joined();
    call.emit('error', failure('OUT_OF_RANGE', 'byte 1000'));
    const errors = await Promise.all(piped.map(({ ended }) => ended.catch((error: KilnError) => error.message)));
    expect(errors).toEqual(['byte 1000', 'byte 1000']);
  });

  it('are not read any more when much more comes than was acknowledged', async () => {
    const { call, sinks, piped } = await joined();
    const chunk = Buffer.alloc(64 * 1024);
    let sent = 0;
    const pump = () => {
      for (; sent < 1000; sent += 1) {
        if (!call.write(outputOf(chunk, { stderr: true }))) {
          sent += 1;
          call.once('drain', pump);
          return;
        }
      }
    };
    pump();
    await vi.waitFor(() => expect(sinks.stderr.writableLength).toBe(1 << 20), { interval: 1 });
    call.write(outputOf('late'));
    sinks.stderr.destroy();
    await sinks.stdout.take();
    expect(sinks.stdout.taken).toBe('late');
    for (const sink of Object.values(sinks)) sink.destroy();
    await Promise.all(piped.map(({ ended }) => ended));
  });

  it('are read in two calls of an agent of before', async () => {
    const streams: OutputStream[] = [];
    const readOutput: Script['readOutput'] = (call) => {
      call.once('data', ({ stream, stderrDelivered }) => {
        streams.push(stream);
        expect(stderrDelivered).toBeUndefined();
        call.end();
      });
    };
    const guest = await connect({ readOutput });
    const targets = (['stdout', 'stderr'] as const).map((stream) => {
      return { stream, from: 0, sink: new PassThrough(), onDelivered: () => {} };
    });
    await Promise.all(guest.pipeOutputs(ref, targets).map(({ ended }) => ended));
    expect(streams).toEqual([OutputStream.OUTPUT_STREAM_STDOUT, OutputStream.OUTPUT_STREAM_STDERR]);
  });
});

describe('a connection that comes back', () => {
  it('is told the session, and taken when the agent knows it', async () => {
    const told: string[] = [];
    const hello: Script['hello'] = ({ request }, done) => {
      told.push(request.session);
      done(null, helloResponse({ session }));
    };
    const guest = await connect({ hello }, true);
    expect(told).toEqual([session]);
    expect(guest.facts.bootId).toBe('b007');
  });

  it.each(['', 'a guess'])('from one that says it was told "%s" is not our agent', async (wrong) => {
    const hello: Script['hello'] = (_call, done) => done(null, helloResponse({ session: wrong }));
    const error = await connect({ hello }, true).catch((thrown: unknown) => thrown as KilnError);
    expect(error).toMatchObject({ code: 'permission-denied', message: 'the caller is not the agent of this VM' });
  });

  it('is not asked for the session the first time', async () => {
    const hello: Script['hello'] = (_call, done) => done(null, helloResponse({ session: 'whatever' }));
    expect((await connect({ hello })).facts.vcpus).toBe(2);
  });
});

describe('an exit', () => {
  it('has the status and what was written of each stream, where the guest can tell', async () => {
    const answer = { exitStatus: 42, stdoutBytes: 0n, stderrBytes: 123_456_789_012n };
    const guest = await connect({ waitProcess: (call) => tellExit(call, answer) });
    expect(await guest.waitExit(ref)).toEqual({ status: 42, written: { stdout: 0, stderr: 123_456_789_012 } });
    const silent = await connect({ waitProcess: (call) => tellExit(call, { exitStatus: 1 }) });
    expect(await silent.waitExit(ref)).toEqual({ status: 1, written: { stdout: undefined, stderr: undefined } });
  });

  it('of a process is told by the call that has begun it, without another', async () => {
    const tellOfExec: Script['tellOfExec'] = (call) => {
      call.write({ pid: 0, process: WaitProcessResponse.fromPartial({ exitStatus: 7, stdoutBytes: 5n }) });
      call.end();
    };
    const { guest, agent } = await connectGuest({ tellOfExec }, cleanups);
    const stdio = { stdin: false, stdout: true, stderr: false, terminal: false, size: undefined };
    await guest.exec(ref, '{}', stdio);
    expect(await guest.waitExit(ref)).toEqual({ status: 7, written: { stdout: 5, stderr: undefined } });
    expect(agent.calls).not.toContain('waitProcess');
    // One that was removed, and nobody waited for, is forgotten: the next one of its name is another.
    await guest.exec(ref, '{}', stdio);
    await guest.removeProcess(ref);
    agent.exit(3, ref.execId);
    expect((await guest.waitExit(ref)).status).toBe(3);
  });

  it('of a container tells what the container has used, where the guest tells it', async () => {
    const stats = { cpu: { usage_usec: 7n }, values: { 'pids.current': 2n } };
    const guest = await connect({ waitProcess: (call) => tellExit(call, { stats }) });
    expect((await guest.waitExit({ id: 'c1', execId: '' })).stats).toMatchObject({
      cpu: { usage_usec: 7n },
      pids: { current: 2n, limit: null },
    });
  });

  it('of a guest that tells an absurd status is a status nevertheless', async () => {
    for (const exitStatus of [256, 4_000_000_255, 0xffffffff]) {
      const guest = await connect({ waitProcess: (call) => tellExit(call, { exitStatus }) });
      const { status } = await guest.waitExit(ref);
      expect(status).toBe(exitStatus % 256);
    }
  });
});

describe('a process', () => {
  it('is asked for with its ids, its spec and its stdio', async () => {
    let asked: unknown;
    const guest = await connect({
      execProcess: ({ request }, done) => {
        asked = request;
        done(null, { pid: 9 });
      },
    });
    const stdio = { stdin: false, stdout: true, stderr: false, terminal: true, size: { width: 80, height: 24 } };
    expect(await guest.exec(ref, '{"args":["sh"]}', stdio)).toBe(9);
    expect(asked).toEqual({
      ...ref,
      process: Buffer.from('{"args":["sh"]}'),
      stdio: { stdin: false, stdout: true, stderr: false, terminal: true, width: 80, height: 24 },
      stdinEnded: false,
    });
  });

  it('is named in each call that concerns it', async () => {
    const asked: unknown[] = [];
    const note =
      (answer: object) =>
      ({ request }: { request: unknown }, done: (error: null, response: never) => void) => {
        asked.push(request);
        done(null, answer as never);
      };
    const described = {
      started: true,
      paused: true,
      execs: [
        { pid: 7, execId: 'a', init: false },
        { pid: 8, execId: 'b', init: false },
      ],
    };
    const guest = await connect({
      signalProcess: note({}),
      resizeTerminal: note({}),
      removeProcess: note({}),
      describeContainer: note(described),
    });
    await guest.signal(ref, 15, true);
    await guest.resize(ref, { width: 80, height: 24 });
    await guest.removeProcess(ref);
    expect(await guest.describe('c1')).toEqual(described);
    expect(asked).toEqual([{ ...ref, signal: 15, all: true }, { ...ref, width: 80, height: 24 }, ref, { id: 'c1' }]);
  });
});
