/** A task service as containerd meets it: on a real ttrpc server, with a container that does as it is told. */
import { duplexPair } from 'node:stream';
import { KilnError } from '../../../src/errors.ts';
import { loggerTo } from '../../../src/observe/logger.ts';
import { TtrpcServer } from '../../../src/rpc/ttrpc/index.ts';
import { toTtrpcStatus } from '../../../src/shim/status.ts';
import type { TaskRequest } from '../../../src/shim/task.ts';
import type { TaskState } from '../../../src/shim/task-record.ts';
import { TaskService } from '../../../src/shim/task-service.ts';
import { TaskSlot } from '../../../src/shim/task-slot.ts';
import type { TaskEvent } from '../../../src/shim/topics.ts';
import { type Gate, ScriptedContainer } from './scripted-container.ts';
import { TaskClient } from './task-client.ts';

export const id = 'c1';
/** The scripted processes have none. */
const openStdio = () => Promise.reject(new Error('not to be called'));
export const exitedAt = { seconds: 1_700_000_000n, nanos: 123_000_000 };

interface LogLine {
  readonly level: string;
  readonly msg: string;
  readonly err?: { readonly message: string };
}

/** A task service on a real ttrpc server, with a container that does as it is told. */
export class Bench {
  readonly container = new ScriptedContainer(id);
  readonly events: TaskEvent[] = [];
  readonly log: LogLine[] = [];
  /** What the next kilnd would find, after each change. */
  readonly saved: TaskState[] = [];
  /** False for a containerd that takes no event. */
  takesEvents = true;
  /** Holds or fails Create. */
  creation: Gate | undefined;
  request: TaskRequest | undefined;
  signal: AbortSignal | undefined;
  readonly slot: TaskSlot;
  readonly server: TtrpcServer;
  readonly client: TaskClient;

  constructor() {
    const logger = loggerTo({ write: (line) => void this.log.push(JSON.parse(line) as LogLine) }, 'trace');
    this.slot = new TaskSlot({
      namespace: 'ns',
      id,
      createContainer: async (request, signal) => {
        this.request = request;
        this.signal = signal;
        const { creation } = this;
        if (creation !== undefined) {
          signal.addEventListener('abort', () => creation.fail(signal.reason));
          await creation.pass();
        }
        return this.container;
      },
      prepareExec: ({ execId, terminal, spec }) => {
        if (spec?.value.toString() !== '{}') throw new KilnError('invalid-argument', `exec ${execId}: malformed`);
        return { execId, directory: '/', terminal, process: '{}', terminalSize: undefined, openStdio };
      },
      publish: (event, onSent) => {
        this.events.push(event);
        if (this.takesEvents) onSent();
      },
      save: (state) => void this.saved.push(state),
      logger,
    });
    this.server = new TtrpcServer(new TaskService(this.slot, logger).table(), { toStatus: toTtrpcStatus });
    this.client = this.connect();
  }

  /** @param replayedRequests how many of the first requests an earlier kilnd was given and did not answer */
  connect(service?: string, replayedRequests = 0): TaskClient {
    const [near, far] = duplexPair();
    this.server.serve(far, { replayedRequests });
    return new TaskClient(near, id, service);
  }

  /** A connection whose first request comes a second time. */
  replaying(): TaskClient {
    return this.connect(undefined, 1);
  }

  /** The events so far, by type. */
  get types(): string[] {
    return this.events.map(({ type }) => type);
  }

  async running(): Promise<void> {
    await this.client.create();
    await this.client.start();
  }
}
