/** A sandbox service as containerd meets it: on a real ttrpc server, with a pod that does as it is told. */
import { duplexPair } from 'node:stream';
import { KilnError } from '../../../src/errors.ts';
import { loggerTo } from '../../../src/observe/logger.ts';
import { TtrpcServer } from '../../../src/rpc/ttrpc/index.ts';
import type { SandboxRequest } from '../../../src/shim/sandbox-request.ts';
import { type SandboxContainer, SandboxService } from '../../../src/shim/sandbox-service.ts';
import { toTtrpcStatus } from '../../../src/shim/status.ts';
import type { SandboxState } from '../../../src/shim/task-record.ts';
import { SandboxClient } from '../../support/sandbox-client.ts';
import { type Gate, ScriptedContainer } from './scripted-container.ts';

export const id = 's1';

export class ScriptedSandbox extends ScriptedContainer implements SandboxContainer {
  async stop(graceMs?: number): Promise<void> {
    this.calls.push(`stop ${graceMs}`);
    if (this.exit.peek() === undefined) this.end(0);
  }

  async ping(): Promise<void> {
    if (this.exit.peek() !== undefined) throw new KilnError('failed-precondition', `container ${id} has ended`);
  }

  describe() {
    return { vm: { vmm: 'scripted' } };
  }
}

export class SandboxBench {
  readonly sandbox = new ScriptedSandbox(id);
  /** What the next kilnd would find, after each change. */
  readonly saved: (SandboxState | undefined)[] = [];
  readonly log: { readonly level: string; readonly msg: string }[] = [];
  /** Holds or fails CreateSandbox. */
  creation: Gate | undefined;
  request: SandboxRequest | undefined;
  readonly service: SandboxService;
  readonly server: TtrpcServer;
  readonly client: SandboxClient;

  constructor() {
    this.service = new SandboxService({
      id,
      createSandbox: async (request, signal) => {
        this.request = request;
        const { creation } = this;
        if (creation !== undefined) {
          signal.addEventListener('abort', () => creation.fail(signal.reason));
          await creation.pass();
        }
        return this.sandbox;
      },
      save: (state) => void this.saved.push(state),
      logger: loggerTo({ write: (line) => void this.log.push(JSON.parse(line)) }, 'trace'),
    });
    this.server = new TtrpcServer(this.service.table(), { toStatus: toTtrpcStatus });
    this.client = this.connect();
  }

  /** @param replayedRequests how many of the first requests an earlier kilnd was given and did not answer */
  connect(replayedRequests = 0): SandboxClient {
    const [near, far] = duplexPair();
    this.server.serve(far, { replayedRequests });
    return new SandboxClient(near, id);
  }

  async running(): Promise<void> {
    await this.client.create();
    await this.client.start();
  }
}
