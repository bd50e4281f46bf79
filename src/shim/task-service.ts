import { ProcessDetails } from '../../gen/containerd/runc_details.ts';
import * as api from '../../gen/containerd/task.ts';
import type { Any } from '../../gen/google/protobuf/any.ts';
import { KilnError } from '../errors.ts';
import type { Logger } from '../observe/logger.ts';
import { parseLimitResources } from '../oci/limits.ts';
import { type CallContext, type ServiceTable, unary } from '../rpc/ttrpc/index.ts';
import { told } from './answers.ts';
import { toDeleteResponse } from './delete-reply.ts';
import { hostCgroupMode, toMetrics } from './metrics.ts';
import { toTaskStatus, toTimestamp } from './status.ts';
import type { ExecTaskRequest, TaskRequest } from './task.ts';
import type { TaskSlot } from './task-slot.ts';

/*
 * containerd's task service (api/runtime/task/v2/shim.proto, and v3 which differs in nothing but the name).
 *
 * One `ctr run` is: Create, Connect, Wait (open until the exit) beside Start, State; on exit State, Delete, Shutdown;
 * then containerd closes the connection and runs the shim binary's `delete`. One `ctr task exec` is: Exec, Wait, Start,
 * and on exit Delete, each with the exec id. For the events see task-events.ts.
 */

/** How the type of what Update carries ends: the Go type, below one of two prefixes that differ between versions. */
const resourcesType = 'runtime-spec/1/LinuxResources';

/** google.protobuf.Empty. */
const Empty = { encode: () => ({ finish: () => new Uint8Array(0) }), decode: () => ({}) };
type Empty = Record<string, never>;

/** What containerd asks of the task in a slot. */
export class TaskService {
  readonly #slot: TaskSlot;
  readonly #logger: Logger;

  constructor(slot: TaskSlot, logger: Logger) {
    this.#slot = slot;
    this.#logger = logger;
  }

  /** The whole service: method name to handler. A method that is not here is answered Unimplemented. */
  table(): ServiceTable {
    const methods = {
      Create: unary(api.CreateTaskRequest, api.CreateTaskResponse, this.#told('Create', this.#create)),
      Start: unary(api.StartRequest, api.StartResponse, this.#told('Start', this.#start)),
      State: unary(api.StateRequest, api.StateResponse, this.#told('State', this.#state)),
      Wait: unary(api.WaitRequest, api.WaitResponse, this.#told('Wait', this.#wait)),
      Kill: unary(api.KillRequest, Empty, this.#told('Kill', this.#kill)),
      Delete: unary(api.DeleteRequest, api.DeleteResponse, this.#told('Delete', this.#delete)),
      Exec: unary(api.ExecProcessRequest, Empty, this.#told('Exec', this.#exec)),
      ResizePty: unary(api.ResizePtyRequest, Empty, this.#told('ResizePty', this.#resizePty)),
      Pids: unary(api.PidsRequest, api.PidsResponse, this.#told('Pids', this.#pids)),
      CloseIO: unary(api.CloseIORequest, Empty, this.#told('CloseIO', this.#closeIo)),
      Pause: unary(api.PauseRequest, Empty, this.#told('Pause', this.#pause)),
      Resume: unary(api.ResumeRequest, Empty, this.#told('Resume', this.#resume)),
      Stats: unary(api.StatsRequest, api.StatsResponse, this.#told('Stats', this.#stats)),
      Update: unary(api.UpdateTaskRequest, Empty, this.#told('Update', this.#update)),
      Connect: unary(api.ConnectRequest, api.ConnectResponse, this.#told('Connect', this.#connect)),
      // One daemon serves the whole host, and an endpoint goes with the binary's `delete`: nothing to do here.
      Shutdown: unary(api.ShutdownRequest, Empty, async () => ({})),
    };
    return { 'containerd.task.v2.Task': methods, 'containerd.task.v3.Task': methods };
  }

  #told<Request, Response>(
    name: string,
    method: (request: Request, context: CallContext) => Promise<Response>,
  ): (request: Request, context: CallContext) => Promise<Response> {
    const waits = name !== 'State' && name !== 'Connect';
    const before = waits ? () => this.#slot.restoring?.done : undefined;
    return told(name, { logger: this.#logger, before }, method.bind(this));
  }

  async #create(request: TaskRequest, context: CallContext): Promise<api.CreateTaskResponse> {
    return { pid: await this.#slot.create(request, context) };
  }

  async #start({ id, execId }: api.StartRequest, { replayed }: CallContext): Promise<api.StartResponse> {
    const { tracked } = this.#slot.findProcess(id, execId);
    const { process } = tracked;
    const announced = Promise.withResolvers<void>();
    // Behind an earlier Start that is still under way, if this is a second one.
    tracked.startAnnounced = Promise.all([tracked.startAnnounced, announced.promise]).then(() => {});
    try {
      // An earlier kilnd may have got so far, and no further.
      if (!replayed || process.state.kind === 'created') await process.start();
      this.#slot.events.started(execId, process.pid);
      this.#slot.save();
      return { pid: process.pid };
    } finally {
      announced.resolve();
    }
  }

  async #exec(request: ExecTaskRequest, { replayed }: CallContext): Promise<Empty> {
    this.#slot.addExec(request, replayed);
    return {};
  }

  async #state({ id, execId }: api.StateRequest): Promise<api.StateResponse> {
    if (this.#slot.restoring !== undefined && id === this.#slot.id && execId === '') {
      const { request, before } = this.#slot.restoring;
      const { bundle, stdin, stdout, stderr, terminal } = request;
      const stdio = { stdin, stdout, stderr, terminal };
      return { id, bundle, ...before, ...stdio, execId, exitStatus: 0, exitedAt: undefined };
    }
    await this.#slot.restoring?.done;
    const { task, tracked } = this.#slot.findProcess(id, execId);
    const { process, stdio } = tracked;
    const exit = process.exit.peek();
    return {
      ...{ id, bundle: task.bundle, pid: process.pid, status: toTaskStatus(process.state), ...stdio, execId },
      exitStatus: exit?.status ?? 0,
      exitedAt: exit === undefined ? undefined : toTimestamp(exit.at),
    };
  }

  async #wait({ id, execId }: api.WaitRequest, { signal }: CallContext): Promise<api.WaitResponse> {
    const exit = await this.#slot.findProcess(id, execId).tracked.process.exit.wait(signal);
    return { exitStatus: exit.status, exitedAt: toTimestamp(exit.at) };
  }

  async #kill({ id, execId, signal, all }: api.KillRequest, { replayed }: CallContext): Promise<Empty> {
    try {
      await this.#slot.findProcess(id, execId).tracked.process.kill(signal, all);
    } catch (error) {
      // The process may have ended by this very signal, when an earlier kilnd sent it.
      if (!(replayed && error instanceof KilnError && error.code === 'not-found')) throw error;
    }
    return {};
  }

  async #resizePty({ id, execId, width, height }: api.ResizePtyRequest): Promise<Empty> {
    await this.#slot.findProcess(id, execId).tracked.process.resize({ width, height });
    return {};
  }

  async #delete({ id, execId }: api.DeleteRequest, { replayed }: CallContext): Promise<api.DeleteResponse> {
    return toDeleteResponse(await this.#slot.delete(id, execId, replayed));
  }

  async #pids({ id }: api.PidsRequest): Promise<api.PidsResponse> {
    const processes = await this.#slot.find(id).container.processes();
    return {
      processes: processes.map(({ pid, execId }) => ({ pid, info: execId === '' ? undefined : details(execId) })),
    };
  }

  async #closeIo({ id, execId, stdin }: api.CloseIORequest): Promise<Empty> {
    const { tracked } = this.#slot.findProcess(id, execId);
    if (stdin) this.#slot.closeStdin(tracked);
    return {};
  }

  async #pause({ id }: api.PauseRequest, { replayed }: CallContext): Promise<Empty> {
    const task = this.#slot.find(id);
    // An earlier kilnd may have done it, and no more.
    if (!replayed || task.container.state.kind !== 'paused') await task.container.pause();
    this.#slot.events.paused();
    return {};
  }

  async #resume({ id }: api.ResumeRequest, { replayed }: CallContext): Promise<Empty> {
    const task = this.#slot.find(id);
    if (!replayed || task.container.state.kind === 'paused') await task.container.resume();
    this.#slot.events.resumed();
    return {};
  }

  async #stats({ id }: api.StatsRequest): Promise<api.StatsResponse> {
    return { stats: toMetrics(await this.#slot.find(id).container.stats(), hostCgroupMode()) };
  }

  async #update({ id, resources }: api.UpdateTaskRequest): Promise<Empty> {
    const { container } = this.#slot.find(id);
    if (!resources?.typeUrl.endsWith(resourcesType)) {
      throw new KilnError(
        'invalid-argument',
        `container ${id}: cannot update resources of type "${resources?.typeUrl ?? ''}", only ${resourcesType}`,
      );
    }
    await container.update(parseLimitResources(resources.value.toString()));
    return {};
  }

  /** An id that is not ours has no pid, which is what runc's shim answers too. */
  async #connect({ id }: api.ConnectRequest): Promise<api.ConnectResponse> {
    const known = this.#slot.container?.pid ?? this.#slot.restoring?.before.pid ?? 0;
    const taskPid = id === this.#slot.id ? known : 0;
    return { shimPid: process.pid, taskPid, version: '' };
  }
}

/** What Pids says of an exec'd process. */
function details(execId: string): Any {
  return {
    typeUrl: 'containerd.runc.v1.ProcessDetails',
    value: Buffer.from(ProcessDetails.encode({ execId }).finish()),
  };
}
