/**
 * The events that a runtime tells containerd, each with its topic: containerd core/runtime/events.go and README.md of
 * core/runtime/v2. The only place where a topic or an event's full name is written.
 */
import {
  TaskCreate,
  TaskDelete,
  TaskExecAdded,
  TaskExecStarted,
  TaskExit,
  TaskOOM,
  TaskPaused,
  TaskResumed,
  TaskStart,
} from '../../gen/containerd/events.ts';

interface Codec<T> {
  encode(message: T): { finish(): Uint8Array };
}

function event<T>(topic: string, codec: Codec<T>): { readonly topic: string; readonly codec: Codec<T> } {
  return { topic, codec };
}

const events = {
  TaskCreate: event('/tasks/create', TaskCreate),
  TaskStart: event('/tasks/start', TaskStart),
  TaskExecAdded: event('/tasks/exec-added', TaskExecAdded),
  TaskExecStarted: event('/tasks/exec-started', TaskExecStarted),
  TaskExit: event('/tasks/exit', TaskExit),
  TaskDelete: event('/tasks/delete', TaskDelete),
  TaskOOM: event('/tasks/oom', TaskOOM),
  TaskPaused: event('/tasks/paused', TaskPaused),
  TaskResumed: event('/tasks/resumed', TaskResumed),
} as const;

type Events = typeof events;
type MessageOf<E> = E extends { readonly codec: Codec<infer T> } ? T : never;

/** An event and its message, such as `{ type: 'TaskExit', message: { containerId, … } }`. */
export type TaskEvent = {
  readonly [Type in keyof Events]: { readonly type: Type; readonly message: MessageOf<Events[Type]> };
}[keyof Events];

/** The parts of an event's envelope that follow from its type. */
export function encodeEvent({ type, message }: TaskEvent): { topic: string; typeUrl: string; value: Uint8Array } {
  const { topic, codec } = events[type];
  // A bare name: containerd's typeurl registers these messages without the usual prefix. The union's type and message
  // belong together, which TypeScript cannot follow through the table.
  return { topic, typeUrl: `containerd.events.${type}`, value: (codec as Codec<unknown>).encode(message).finish() };
}
