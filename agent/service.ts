/**
 * The method table: gRPC in, verbs out. Generated types end here.
 */
import type { handleUnaryCall, ServerDuplexStream, ServerWritableStream } from '@grpc/grpc-js';
import {
  type AgentServer,
  type CreateContainerResponse,
  type ExecProcessResponse,
  WaitProcessResponse,
} from '../gen/kiln/agent/v1/agent.ts';
import { hideCards } from './cards.ts';
import { allContainers } from './cgroup.ts';
import type { Containers } from './containers.ts';
import { relayDial } from './dial.ts';
import { findDisks } from './disks.ts';
import { AgentError, grpcStatusOf } from './errors.ts';
import { filesError, openWrite, sendChanges, sendFiles, takeFiles } from './files.ts';
import { adjustClock, hello } from './hello.ts';
import { sampleRandomness } from './identity.ts';
import { encodePorts, type Listeners } from './listeners.ts';
import type { Nameservers } from './nameservers.ts';
import type { GuestNetwork } from './network.ts';
import type { Pod } from './pod.ts';
import type { ProcessName } from './process.ts';
import { processDetails } from './process-details.ts';
import { readStats } from './stats.ts';
import { relayOutput, writeStdin } from './stream-calls.ts';

export interface ServiceOptions {
  readonly containers: Containers;
  readonly pod: Pod;
  readonly listeners: Listeners;
  readonly nameservers: Nameservers;
  readonly network: GuestNetwork;
  /** See `hello`. */
  readonly ownsGuest: boolean;
  /** When the connection was made: `performance.now()`. */
  readonly connectedAt: () => number;
  /** Called when a host has said Hello and was understood. */
  readonly onHello?: (becomesTemplate: boolean) => void;
}

/** The service for one connection. Until Hello has succeeded on it, every other call is FAILED_PRECONDITION. */
export function createService({
  containers,
  pod,
  listeners,
  nameservers,
  network,
  ownsGuest,
  connectedAt,
  onHello,
}: ServiceOptions): AgentServer {
  let greeted = false;
  const greetedFirst = () => {
    if (!greeted) throw new AgentError('failed-precondition', 'the first call on a connection must be Hello');
  };
  const unary =
    <Request, Response>(
      handler: (request: Request) => Response | Promise<Response>,
    ): handleUnaryCall<Request, Response> =>
    async (call, done) => {
      let response: Response;
      try {
        greetedFirst();
        response = await handler(call.request);
      } catch (error) {
        done(grpcStatusOf(error));
        return;
      }
      done(null, response);
    };

  /** A call whose answer is a stream, for which an error is the stream's end. */
  const streaming =
    <Call extends ServerWritableStream<Request, Response> | ServerDuplexStream<Request, Response>, Request, Response>(
      serve: (call: Call) => void | Promise<void>,
    ) =>
    async (call: Call): Promise<void> => {
      try {
        greetedFirst();
        await serve(call);
      } catch (error) {
        call.emit('error', grpcStatusOf(error));
      }
    };

  /** A call whose answer is a stream of files. */
  const filesOut =
    <Request extends object, Response>(
      send: (request: Request, call: ServerWritableStream<Request, Response>) => Promise<void>,
    ) =>
    async (call: ServerWritableStream<Request, Response>): Promise<void> => {
      call.on('error', () => {});
      try {
        greetedFirst();
        await send(call.request, call);
      } catch (error) {
        call.emit('error', grpcStatusOf(filesError(error, pathOf(call.request))));
      }
    };

  /** Says what WaitProcess says of a process, and ends the call. */
  const tellExit = async (
    call: { on(event: 'cancelled', listener: () => void): unknown; end(): unknown },
    name: ProcessName,
    say: (process: WaitProcessResponse) => void,
  ): Promise<void> => {
    const init = name.execId === '';
    const tell = (oomKills: bigint) => say(WaitProcessResponse.fromPartial({ oomKills }));
    using watch = init ? containers.find(name.id)?.followOom(tell) : undefined;
    call.on('cancelled', () => watch?.[Symbol.dispose]());
    const exit = await containers.get(name.id).wait(name.execId);
    say({
      exitStatus: exit.status,
      exitedAtNs: exit.atNs,
      stdoutBytes: optionalBigInt(exit.stdoutBytes),
      stderrBytes: optionalBigInt(exit.stderrBytes),
      stats: init ? containers.find(name.id)?.finalStats() : undefined,
      oomKills: undefined,
    });
    call.end();
  };

  /** Says which process was made, and then as `tellExit`. */
  const tellOfMade = <Request>(
    call: ServerWritableStream<Request, CreateContainerResponse | ExecProcessResponse>,
    name: ProcessName,
    pid: number,
  ): Promise<void> => {
    call.write({ pid, process: undefined });
    return tellExit(call, name, (process) => call.write({ pid: 0, process }));
  };

  return {
    hello: (call, done) => {
      try {
        const response = hello(call.request, ownsGuest, connectedAt());
        greeted = true;
        // Its clones find it running.
        if (ownsGuest && call.request.becomesTemplate) listeners.start();
        onHello?.(call.request.becomesTemplate);
        done(null, response);
      } catch (error) {
        done(grpcStatusOf(error));
      }
    },
    adjustClock: unary((request) => adjustClock(request, ownsGuest)),
    sampleRandomness: unary(sampleRandomness),
    preparePod: unary((request) => {
      if (request.network !== undefined) network.apply(request.network);
      pod.prepare(request);
      return {};
    }),
    listContainers: unary(() => ({ ids: containers.list() })),
    findDisks: unary(({ disks }) => ({ devices: findDisks(disks) })),
    createContainer: streaming(async (call) => {
      const { request } = call;
      if (request.network !== undefined) network.apply(request.network);
      // Its driver may have come meanwhile.
      if (ownsGuest) hideCards();
      await tellOfMade(call, { id: request.id, execId: '' }, await containers.create(request));
    }),
    startContainer: unary(async (request) => {
      if (request.network !== undefined) network.apply(request.network);
      const container = containers.get(request.id);
      if (request.stdinEnded) container.process('').stdio.stdin?.end();
      await container.start();
      return {};
    }),
    execProcess: streaming(async (call) => {
      const { id, execId, stdinEnded } = call.request;
      const container = containers.get(id);
      const pid = await container.exec(call.request);
      if (stdinEnded) container.process(execId).stdio.stdin?.end();
      await tellOfMade(call, call.request, pid);
    }),
    signalProcess: unary(({ id, execId, signal, all }) => {
      containers.get(id).signal(execId, signal, all);
      return {};
    }),
    waitProcess: streaming((call) => tellExit(call, call.request, (process) => call.write(process))),
    describeContainer: unary(({ id }) => containers.get(id).describe()),
    listProcesses: unary(({ id }) => ({ processes: containers.get(id).processes() })),
    readProcesses: unary(({ id }) => ({
      processes: containers
        .get(id)
        .processes()
        .flatMap(({ pid }) => processDetails(pid) ?? []),
    })),
    resizeTerminal: unary(({ id, execId, width, height }) => {
      containers.get(id).process(execId).stdio.resize(width, height);
      return {};
    }),
    removeProcess: unary(({ id, execId }) => {
      containers.get(id).removeProcess(execId);
      return {};
    }),
    removeContainer: unary(async ({ id, force, guestEnds }) => {
      await containers.get(id).remove(force, guestEnds);
      return {};
    }),
    pauseContainer: unary(async ({ id }) => {
      await containers.get(id).controls('pause', 'running').pause();
      return {};
    }),
    resumeContainer: unary(({ id }) => {
      containers.get(id).controls('resume', 'running').resume();
      return {};
    }),
    readStats: unary(({ id }) =>
      id === ''
        ? readStats(allContainers)
        : containers.get(id).controls('read the statistics of', 'created', 'running', 'stopped').stats(),
    ),
    setLimits: unary(async ({ id, files }) => {
      await containers.get(id).controls('change the limits of', 'created', 'running').setLimits(files);
      return {};
    }),
    setNetwork: unary((request) => {
      if (request.network === undefined) {
        throw new AgentError('invalid-argument', 'there is no network in the request');
      }
      network.apply(request.network);
      return {};
    }),
    watchListeners: streaming((call) => {
      const watch = listeners.watch(({ ipv4Ports, ipv6Ports }) => {
        call.write({ ipv4Ports: encodePorts(ipv4Ports), ipv6Ports: encodePorts(ipv6Ports) });
      });
      // A call that is cancelled or whose connection breaks does not end by itself.
      call.on('cancelled', () => {
        watch[Symbol.dispose]();
        call.destroy();
      });
      call.on('error', () => {});
    }),
    dial: streaming(async (call) => {
      await relayDial(call);
      call.end();
    }),
    serveNameservers: unary(async ({ addresses }) => {
      await nameservers.serve(addresses);
      return {};
    }),
    relayQueries: streaming((call) => nameservers.relay(call)),
    readOutput: (call) => {
      // A stream that is cancelled does not end by itself.
      call.on('cancelled', () => call.destroy());
      const fail = (error: unknown) => call.emit('error', grpcStatusOf(error));
      try {
        greetedFirst();
        relayOutput(containers, call, fail);
      } catch (error) {
        fail(error);
      }
    },
    readChanges: filesOut((request, call) => sendChanges(request, containers.get(request.id).mountsAtRest(), call)),
    readFiles: filesOut((request, call) => sendFiles(request, containers.get(request.id).root(), call)),
    writeFiles: async (call, done) => {
      let path = '';
      try {
        greetedFirst();
        const { first, rest } = await openWrite(call);
        path = pathOf(first);
        const write = (root: string) => takeFiles(first, root, rest);
        if (first.path.length === 0) await containers.provideFiles(first.id, write);
        else await write(containers.get(first.id).root());
        done(null, {});
      } catch (error) {
        done(grpcStatusOf(filesError(error, path)));
      }
    },
    writeStdin: async (call, done) => {
      try {
        greetedFirst();
        await writeStdin(containers, call);
        done(null, {});
      } catch (error) {
        done(grpcStatusOf(error));
      }
    },
  };
}

/** Where a call's files are, for a message. */
function pathOf(request: object): string {
  return 'path' in request && Buffer.isBuffer(request.path) ? request.path.toString() : '';
}

function optionalBigInt(value: number | undefined): bigint | undefined {
  return value === undefined ? undefined : BigInt(value);
}
