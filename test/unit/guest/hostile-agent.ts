/**
 * An agent that means harm, in a process of its own so that its work is not counted as ours: `hostile-agent.ts NAME`
 * listens on an abstract socket "NAME attack" for each attack, answers Hello in order, and does that to the next call.
 */
import { createServer, type Socket } from 'node:net';
import {
  HelloResponse,
  ReadOutputResponse,
  RelayQueriesResponse,
  WaitProcessResponse,
  WatchListenersResponse,
} from '../../../gen/kiln/agent/v1/agent.ts';
import {
  answer,
  answerHeaders,
  dataFrames,
  flood,
  frame,
  grpcMessage,
  literal,
  repeated,
  serveRaw,
} from './raw-peer.ts';
import { helloResponse, outputOf } from './scripted-agent.ts';

type Attack = (socket: Socket, stream: number) => void;

/** A flood of this frame, after the headers of an answer. */
const endless =
  (bytes: (stream: number) => Buffer): Attack =>
  (socket, stream) => {
    socket.write(answerHeaders(stream));
    flood(socket, bytes(stream));
  };

const mib = 1 << 20;
const output = (data: Buffer) => grpcMessage(ReadOutputResponse.encode(outputOf(data)).finish());

export const attacks = {
  // Frames that carry nothing.
  'settings without end': endless(() => frame('settings', { payload: Buffer.from([0, 3, 0, 0, 0, 9]) })),
  'pings without end': endless(() => frame('ping', { payload: Buffer.alloc(8) })),
  'answers to pings that nobody sent': endless(() => frame('ping', { flags: 1, payload: Buffer.alloc(8) })),
  'resets of a stream that is closed': endless((stream) =>
    frame('reset', { stream: stream - 2, payload: Buffer.alloc(4) }),
  ),
  'empty data frames': endless((stream) => frame('data', { stream })),
  'window updates of one byte': endless(() => frame('windowUpdate', { payload: Buffer.from([0, 0, 0, 1]) })),
  'priorities of streams that do not exist': endless(() =>
    frame('priority', { stream: 99, payload: Buffer.from([0, 0, 0, 0, 1]) }),
  ),
  'interim headers without end': endless((stream) =>
    frame('headers', { flags: 4, stream, payload: literal(':status', '100') }),
  ),
  'frames of an unknown type': endless(() => {
    const bytes = frame('ping', { payload: Buffer.alloc(8) });
    bytes.writeUInt8(0xbe, 3);
    return bytes;
  }),
  'continuations without end': (socket, stream) => {
    socket.write(frame('headers', { stream, payload: Buffer.from([0x88]) }));
    flood(socket, frame('continuation', { stream, payload: literal('x', 'y'.repeat(1000)) }));
  },
  'megabytes of headers': (socket, stream) => {
    const header = literal('x-much', 'y'.repeat(16_000));
    socket.write(frame('headers', { stream, payload: Buffer.concat([Buffer.from([0x88]), header]) }));
    for (let i = 0; i < 200; i += 1) socket.write(frame('continuation', { stream, payload: header }));
    socket.write(frame('continuation', { flags: 4, stream }));
  },
  'streams that it opens itself': endless((stream) =>
    frame('pushPromise', { flags: 4, stream, payload: Buffer.from([0, 0, 0, 2, 0x82, 0x84, 0x87]) }),
  ),
  'an answer on a stream that was never opened': endless(() => answerHeaders(4001)),
  'the end of a stream, again and again': endless((stream) =>
    frame('headers', { flags: 5, stream, payload: literal('grpc-status', '0') }),
  ),
  // Messages.
  'a message of 4 GiB': endless((stream) => dataFrames(stream, grpcMessage(Buffer.alloc(16_000), 0xffff_ffff))),
  'a message that is compressed': (socket, stream) => {
    socket.write(answerHeaders(stream));
    socket.write(dataFrames(stream, grpcMessage(Buffer.alloc(3), 3, 1)));
  },
  'more than the windows allow': endless((stream) => dataFrames(stream, Buffer.alloc(16_384))),
  /** One answer as long as can be, a byte a frame. */
  'a message in frames of one byte': (socket, stream) => {
    socket.write(answerHeaders(stream));
    socket.write(dataFrames(stream, grpcMessage(Buffer.alloc(0), mib)));
    flood(socket, frame('data', { stream, payload: Buffer.from([0]) }));
  },
  /** After what fills the reader, nearly all that the stream's window holds. */
  'output in frames of one byte': (socket, stream) => {
    socket.write(answerHeaders(stream));
    socket.write(dataFrames(stream, repeated(output(Buffer.alloc(4000)), 64)));
    socket.write(dataFrames(stream, grpcMessage(Buffer.alloc(0), 700_000)));
    socket.write(repeated(frame('data', { stream, payload: Buffer.from([0]) }), 699_999));
  },
  'output of one byte a message': (socket, stream) => {
    socket.write(answerHeaders(stream));
    const message = output(Buffer.from('y'));
    socket.write(repeated(frame('data', { stream, payload: message }), Math.floor(mib / message.length)));
  },
  'output of no bytes': (socket, stream) => {
    socket.write(answerHeaders(stream));
    const payload = repeated(grpcMessage(Buffer.alloc(0)), 3200);
    socket.write(repeated(frame('data', { stream, payload }), 60));
  },
  'listeners without end': (socket, stream) => {
    socket.write(answerHeaders(stream));
    const listeners = { ipv4Ports: Buffer.alloc(1600, 1), ipv6Ports: Buffer.alloc(0) };
    const report = grpcMessage(WatchListenersResponse.encode(listeners).finish());
    const payload = repeated(report, Math.floor(16_000 / report.length));
    socket.write(repeated(frame('data', { stream, payload }), 60));
  },
  'queries without end': (socket, stream) => {
    socket.write(answerHeaders(stream));
    const query = { id: 1, nameserver: Buffer.alloc(4, 1), tcp: false, query: Buffer.alloc(12) };
    const message = grpcMessage(RelayQueriesResponse.encode(query).finish());
    const payload = repeated(message, Math.floor(16_000 / message.length));
    socket.write(repeated(frame('data', { stream, payload }), 60));
  },
  'kills without end': (socket, stream) => {
    socket.write(answerHeaders(stream));
    const kill = grpcMessage(WaitProcessResponse.encode(WaitProcessResponse.fromPartial({ oomKills: 7n })).finish());
    const payload = repeated(kill, Math.floor(16_000 / kill.length));
    socket.write(repeated(frame('data', { stream, payload }), 60));
  },
  'a frame of which half comes': (socket, stream) => {
    socket.write(answerHeaders(stream));
    socket.write(Buffer.from([0, 0x40, 0, 0, 0, 0, 0, 0, 3, 1, 2, 3]));
  },
  'a line of HTTP/1.1': (socket) => {
    socket.write('HTTP/1.1 200 OK\r\n\r\n');
  },
  'the end of the connection': (socket) => {
    socket.destroy();
  },
} satisfies Record<string, Attack>;

export type AttackName = keyof typeof attacks;

if (process.argv[1] === import.meta.filename) {
  const [, , name = ''] = process.argv;
  for (const [attack, begin] of Object.entries(attacks)) {
    createServer((socket) => {
      serveRaw(socket, (stream) => {
        if (stream === 1)
          socket.write(answer(stream, HelloResponse.encode(helloResponse({ realtimeNs: 0n })).finish()));
        else begin(socket, stream);
      });
    }).listen(`\0${name} ${attack}`);
  }
  process.send?.('listening');
  process.on('disconnect', () => process.exit());
}
